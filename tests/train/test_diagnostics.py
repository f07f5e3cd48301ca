"""Diagnostics of the versions of RWKV against NumPy's values from parameters, updates and logits."""

import jax
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict

from rwkv_jax import train
from rwkv_jax.train import optim
from rwkv_jax.train.diagnostics import make_diagnose

B, T = 2, 8
DECAYS = {"rwkv4": ("time_decay", "time_first"), "rwkv7": ("w0",)} | dict.fromkeys(
    ("rwkv5", "rwkv6"), ("time_decay", "time_faaaa")
)
SLOW = ("rwkv5", "rwkv6")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in DECAYS])
def test_make_diagnose_agrees_with_numpy_on_parameters_and_the_next_step(kind):
    model, params = small.drawn(small.make(kind))
    tx, zero, ids = optim.optimiser(), np.zeros((), np.int32), small.tokens(B, T + 1)
    batch, lr = {"tokens": ids, "mask": np.ones((B, T), bool)}, np.float32(1e-2)

    @jax.jit
    def both(params):
        state = train.TrainState(zero, params, tx.init(params), zero)
        same, values = make_diagnose(model, tx)(state, batch, lr)
        after, row = train.make_step(model, tx)(state, batch, lr)
        return same.params, values, after.params, row["grad_norm"], model.apply({"params": params}, ids[:, :-1])[0]

    same, values, after, grad_norm, logits = jax.device_get(both(params))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    moved = jax.tree.map(np.subtract, after, params)
    for name, tree in {"parameter_norm": params, "update_norm": moved}.items():
        decays = [x.ravel() for path, x in flatten_dict(tree).items() if path[-1] in DECAYS[kind]]
        assert values[name]["decays"] == pytest.approx(np.linalg.norm(np.concatenate(decays)), rel=1e-5)
        whole = np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(tree)])
        assert np.linalg.norm([*values[name].values()]) == pytest.approx(whole, rel=1e-5)  # every leaf is in one group
    assert np.linalg.norm([*values["gradient_norm"].values()]) == pytest.approx(grad_norm, rel=1e-5)
    assert values["logit_max"] == pytest.approx(logits.max(), rel=1e-5)
    assert values["k_max"].shape == (small.L,) and (values["k_max"] > 0).all()
    for shares in values["dead_channels"].values():
        assert shares.shape == (small.L,) and ((shares >= 0) & (shares <= 1)).all()
