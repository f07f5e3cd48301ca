"""Parameters in bfloat16: what adds up stays float32; and how the experiment judges what bfloat16 costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bf16 import run
from rwkv_jax import models, optim, train


def _dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_moments_and_sums_of_gradients_are_float32_and_parameters_stay_bfloat16(accumulation):
    """But for time_decay and time_first, which are float32 in every model: rounded, they forget at other rates."""
    model, tx = models.build("rwkv4", vocab_size=8, num_layers=1, dim=8, param_dtype="bfloat16"), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    rows = {"tokens": jnp.zeros((4, 5), jnp.int32), "mask": jnp.ones((4, 4), bool)}
    gradient, *_ = jax.eval_shape(train.step.make_gradient(model, accumulation=accumulation), state, rows)
    after, _ = jax.eval_shape(train.make_step(model, tx, accumulation=accumulation), state, rows, jnp.float32(1))
    assert _dtypes(gradient) == _dtypes(after.opt_state) == {jnp.dtype("float32")}
    dtype_of = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtype_of(after) == dtype_of(state)
    assert after.params["blocks"]["att"]["key"]["kernel"].dtype == jnp.bfloat16
    assert after.params["blocks"]["att"]["time_decay"].dtype == jnp.float32


def test_an_update_is_that_of_float32_rounded_once():
    """Weight decay, group factors and clipping included."""
    rng = np.random.default_rng(0)
    draw = lambda: {"kernel": jnp.asarray(rng.standard_normal((4, 4)), jnp.bfloat16)}
    tx = optim.optimiser(weight_decay=0.1, groups=(("kernel", 3.0),))
    params, zero, lr = draw(), jnp.zeros((), jnp.int32), 1e-2
    state = train.TrainState(zero, params, tx.init(params), zero)
    same = state.replace(params=optim.wide(params))
    for grads in (draw(), draw()):
        same = same.replace(params=optim.wide(state.params))  # from the same rounded parameters
        state, _ = train.step.apply_gradient(tx, state, grads, zero, lr)
        same, _ = train.step.apply_gradient(tx, same, optim.wide(grads), zero, lr)
        assert np.array_equal(state.params["kernel"], same.params["kernel"].astype(jnp.bfloat16))
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, same.opt_state)


def _values(added, again="a"):
    """Cells of the experiment: seed s of an arm is at 2 + s / 10 + what bfloat16 adds, on two documents."""
    cells = {}
    for arm, extra in zip(run.ARMS, (0.0, added, added), strict=True):
        for seed, jitter in zip((0, 1, 2), (0.0, 1e-4, -1e-4), strict=True):
            level = 2 + seed / 10 + extra + (jitter if extra else 0)
            nats = [level * np.log(2) * n for n in (100, 300)]
            cell = {"bits_per_byte": level, "document_nats": nats, "document_bytes": [100, 300]}
            cells[f"{arm}, seed {seed}"] = cell | {"parameters_sha256": "a", "curve": {}}
    return cells | {
        f"{arm}, seed 0, again": {"parameters_sha256": again, "curve": {}} for arm in run.PRESETS["cpu"].repeated
    }


@pytest.mark.parametrize(
    ("added", "verdict"),
    [(0.002, "reproduced"), (0.03, "contradicted"), (0.0101, "not resolved"), (-0.1, "reproduced")],
)
def test_the_experiment_judges_the_paired_difference(added, verdict):
    found = run.conclude(run.PRESETS["cpu"], _values(added))
    its = found["against_float32"]["bfloat16 activations"]
    assert its["mean"] == pytest.approx(added) and its["low"] < added < its["high"]
    assert [row["verdict"] for row in found["ledger"]] == [verdict, verdict, "reproduced"]


def test_the_experiment_notices_that_a_seed_gave_other_bits():
    found = run.conclude(run.PRESETS["cpu"], _values(0.002, again="b"))
    assert found["ledger"][-1]["verdict"] == "contradicted" and not any(found["same_bits"].values())


def test_parameters_in_bfloat16_start_as_the_float32_ones_rounded():
    fields = {"vocab_size": 8, "num_layers": 1, "dim": 8}
    start = lambda dtype: models.build("rwkv4", param_dtype=dtype, **fields).init(
        jax.random.key(0), jnp.zeros((1, 1), int)
    )
    for narrow, wide in zip(jax.tree.leaves(start("bfloat16")), jax.tree.leaves(start("float32")), strict=True):
        np.testing.assert_array_equal(narrow, wide.astype(narrow.dtype))
