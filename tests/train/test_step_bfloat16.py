"""Parameters in bfloat16: sums stay float32, and an update is rounded once. Steps that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models, train
from rwkv_jax.train import optim
from rwkv_jax.train.step import Objective, mean_gradient

FIELDS = {"vocab_size": 8, "num_layers": 1, "dim": 8}


def _dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def test_step_of_bfloat16_parameters_keeps_moments_and_gradients_in_float32():
    """time_decay and time_first are float32 in every model: rounded, they would decay at other rates."""
    fields = FIELDS | {"scan": False, "receptance": False}
    model, tx = models.build("rwkv4", param_dtype="bfloat16", **fields), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    rows = {"tokens": np.zeros((4, 5), np.int32), "mask": np.ones((4, 4), bool)}
    mean = functools.partial(mean_gradient, model, Objective(accumulation=2))
    gradient, loss, _ = jax.eval_shape(mean, state, rows)
    after, _ = jax.eval_shape(functools.partial(train.apply_gradient, tx), state, gradient, loss, jnp.float32(1))
    assert _dtypes(gradient) == _dtypes(after.opt_state) == {jnp.dtype("float32")}
    dtype_of = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtype_of(after) == dtype_of(state)
    assert after.params["blocks_0"]["att"]["key"]["kernel"].dtype == jnp.bfloat16
    assert after.params["blocks_0"]["att"]["time_decay"].dtype == jnp.float32


TX = optim.optimiser(weight_decay=0.1, groups=(("kernel", 3.0),))  # and clipping
LR = np.float32(1e-2)


@jax.jit
def _apply(state, grads, loss):
    return train.apply_gradient(TX, state, grads, loss, LR)[0]


def _draw(rng, dtype=jnp.bfloat16):
    return {"kernel": rng.standard_normal((4, 4)).astype(dtype)}


def _wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def _start(rng, dtype=jnp.bfloat16):
    params, zero = _draw(rng, dtype), np.zeros((), np.int32)
    return train.TrainState(zero, params, jax.jit(TX.init)(params), zero)


def test_apply_gradient_rounds_an_update_of_bfloat16_parameters_once():
    rng = np.random.default_rng(0)
    state, zero = _start(rng), np.float32(0)
    for grads in (_draw(rng), _draw(rng)):
        expected = _apply(state.replace(params=_wide(state.params)), _wide(grads), zero)
        state = _apply(state, grads, zero)
        assert np.array_equal(state.params["kernel"], np.asarray(expected.params["kernel"]).astype(jnp.bfloat16))
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, expected.opt_state)


@pytest.mark.parametrize("loss, gradient", [(0, np.inf), (0, np.nan), (np.nan, 1), (np.inf, 1)])
def test_apply_gradient_skips_a_loss_or_gradient_that_is_not_finite(loss, gradient):
    rng = np.random.default_rng(0)
    state, grads = _start(rng, np.float32), _draw(rng, np.float32)
    grads["kernel"][1, 2] *= gradient
    after = _apply(state, grads, np.float32(loss))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert (int(after.step), int(after.skipped)) == (1, 1)
