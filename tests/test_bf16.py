"""Parameters in bfloat16: what adds up stays float32; and the experiment that measures what they cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bf16 import plot
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


@pytest.mark.slow
def test_the_experiment_runs_and_is_drawn(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.bf16.run", "--smoke", f"--out={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, env=env, check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["param_dtype"] for row in results["rows"]] == ["float32", "bfloat16"]
    assert all(np.isfinite(row["valid_loss_nats"]) and row["skipped"] == 0 for row in results["rows"])
    plot.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
