"""Trains like the original, step for step.

`goldens/official_trajectory.npz` holds 150 steps of the released trainer's own `RWKV-v4neo/src/model.py`, run
unchanged on a CPU in float64: V 64, L 3, D 32, 4 rows of T 48, Adam (.9, .99, 1e-8), lr 3e-3 times the groups 1, 2, 3,
L2Wrap, clip 1.0. `init/` and `final/` are its tensors under official names, `losses` the cross entropy before each
step, `grad_norms` before clipping. Initial state, equations, backward, L2Wrap, groups, clip and Adam are one proof.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import optim, train
from rwkv_jax.interop import official

GOLDEN = Path(__file__).parent / "goldens" / "official_trajectory.npz"
LR = 3e-3


def _train(steps, l2wrap=True, groups=optim.GROUPS):
    """(losses, gradient norms, final parameters) of our step from the same tensors on the same batches."""
    golden = np.load(GOLDEN)
    tensors = {k.removeprefix("init/"): golden[k].astype(np.float64) for k in golden if k.startswith("init/")}
    model, params = official.from_official(tensors, dtype="float64")
    tx = optim.optimiser(groups=groups)
    zero = jnp.zeros((), jnp.int32)
    state = train.TrainState(zero, params, tx.init(params), zero)
    step = jax.jit(train.make_step(model, tx, l2wrap=l2wrap))
    losses, norms = [], []
    for tokens_BT in golden["tokens"][:steps].astype(np.int32):
        batch = {"tokens": tokens_BT, "mask": np.ones_like(tokens_BT[:, 1:], bool)}
        state, values = step(state, batch, np.float64(LR))
        losses.append(float(values["loss_nats"]))
        norms.append(float(values["grad_norm"]))
    return np.array(losses), np.array(norms), state.params


@pytest.mark.usefixtures("x64")
def test_every_step_and_the_final_tensors_are_the_released_trainers():
    golden = np.load(GOLDEN)
    losses, norms, params = _train(150)
    assert np.abs(losses - golden["losses"]).max() < 1e-6
    assert np.abs(norms / golden["grad_norms"] - 1).max() < 1e-6
    for name, tensor in official.to_official(params).items():
        assert np.abs(tensor - golden[f"final/{name}"]).max() < 1e-6, name  # the file holds them as float32


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("change", [{"l2wrap": False}, {"groups": ()}])
def test_the_proof_notices_a_missing_piece(change):
    losses, _, _ = _train(30, **change)
    assert np.abs(losses - np.load(GOLDEN)["losses"][:30]).max() > 1e-5
