"""The loss in chunks of tokens: the same numbers, without logits of all tokens at one time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio

from rwkv_jax import models, optim, train

B, T, D, V = 4, 9, 8, 13
NEOX = 50_277


def _drawn(dtype):
    rng = np.random.default_rng(0)
    x_BTD, kernel_DV = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    mask_BT = rng.random((B, T)) < 0.7
    return x_BTD.astype(dtype), kernel_DV.astype(dtype), rng.integers(0, V, (B, T)), mask_BT


def _head(kernel_DV, x_ND):
    return x_ND @ kernel_DV


def _value_and_gradients(chunk, dtype=np.float64, penalised=True):
    """((objective, nll), gradients of the objective, twice, to x and the kernel)."""
    x_BTD, kernel_DV, targets_BT, mask_BT = _drawn(dtype)

    def objective(x_BTD, kernel_DV):
        total, nll = optim.losses_of_head(
            _head, kernel_DV, x_BTD, targets_BT, mask_BT, chunk=chunk, penalised=penalised
        )
        return 2 * total, (total, nll)

    (_, losses), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(x_BTD, kernel_DV)
    return losses, gradients


def _expected(x_BTD, kernel_DV, targets_BT, mask_BT):
    """The same by definition and autodiff, at once."""

    def objective(x_BTD, kernel_DV):
        logits_BTV = x_BTD @ kernel_DV
        nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)[..., 0]
        penalty_BT = 0.5e-4 * logits_BTV.max(-1) ** 2
        total = jnp.where(mask_BT, nll_BT + penalty_BT, 0).sum()
        return 2 * total, (total, jnp.where(mask_BT, nll_BT, 0).sum())

    (_, losses), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(x_BTD, kernel_DV)
    return losses, gradients


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [None, 1, 5, 18, 35])  # all, one token, a ragged last, two halves, all but one
def test_losses_and_gradients_are_those_of_the_definition(chunk):
    """A token's gradient is a sum over V alone; the others sum N tokens in another order, off by at most N rounding
    errors of their largest partial sum."""
    losses, (dx, dkernel) = _value_and_gradients(chunk)
    expected, (dx0, dkernel0) = _expected(*_drawn(np.float64))
    eps = np.finfo(np.float64).eps
    np.testing.assert_allclose(losses, expected, rtol=B * T * eps)
    assert error_ratio(dx, dx0) < V * eps
    assert error_ratio(dkernel, dkernel0) < B * T * eps


def test_without_the_penalty_the_objective_is_the_loss():
    (total, nll), _ = _value_and_gradients(5, np.float32, penalised=False)
    assert total == nll == pytest.approx(float(_expected(*_drawn(np.float32))[0][1]), rel=1e-6)


def test_gradients_of_a_narrow_head_are_summed_over_chunks_in_float32():
    """36 chunks of a token each: in bfloat16 the sum would lose what is below 2^-8 of it at every step."""
    x_BTD, kernel_DV, targets_BT, mask_BT = _drawn(jnp.bfloat16)

    def gradient(chunk, kernel_DV):
        objective = lambda kernel_DV: optim.losses_of_head(
            _head, kernel_DV, x_BTD, targets_BT, mask_BT, chunk=chunk, penalised=False
        )[0]
        return jax.grad(objective)(kernel_DV)

    apart, together = (gradient(chunk, kernel_DV.astype(np.float32)) for chunk in (1, B * T))
    assert apart.dtype == np.float32 and gradient(1, kernel_DV).dtype == jnp.bfloat16
    assert error_ratio(apart, together) < 2**-8


def _tokens_with_logits(jaxpr, vocab_size):
    """Tokens of every array with a vocabulary axis, but the head and the embedding [D, V]."""
    shapes = set(re.findall(rf"\[([\d,]+),{vocab_size}\]", str(jaxpr))) - {str(D)}
    return {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}


@pytest.mark.parametrize("vocab_size, chunk, expected", [(NEOX, None, 2048), (NEOX, 100, 100), (256, None, 8192)])
def test_a_large_vocabulary_is_chunked_and_a_small_one_is_not(vocab_size, chunk, expected):
    """2^27 / 50,277 is 2,669 tokens: a quarter of 8,192 is the largest power-of-two share below."""

    def objective(x_BTD, kernel_DV, targets_BT):
        ones = jnp.ones((8, 1024), bool)
        return optim.losses_of_head(_head, kernel_DV, x_BTD, targets_BT, ones, chunk=chunk)[0]

    shape = jax.ShapeDtypeStruct
    operands = shape((8, 1024, D), jnp.float32), shape((D, vocab_size), jnp.float32), shape((8, 1024), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(*operands)
    assert _tokens_with_logits(jaxpr, vocab_size) - {1} == {expected}  # and one [1, V] of taking targets
    assert str(jaxpr).count("= dot_general") == 3  # logits are computed once


def test_the_memory_of_a_step_is_that_of_its_chunk():
    """Logits, their softmax and its cotangent live together for 128 tokens of 2,048."""
    model, tx = models.build("rwkv4", vocab_size=NEOX, num_layers=1, dim=D), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    shape = lambda length, dtype: jax.ShapeDtypeStruct((8, length), dtype)
    rows = {"tokens": shape(257, jnp.int32), "mask": shape(256, bool)}
    step = jax.jit(train.make_step(model, tx, loss_chunk=128), donate_argnums=0)
    traced = step.trace(state, rows, jax.ShapeDtypeStruct((), jnp.float32))
    assert max(_tokens_with_logits(traced.jaxpr, NEOX + 3)) == 128  # a multiple of 8 columns
    memory = traced.lower().compile().memory_analysis()
    parameters = 2 * D * NEOX * 4  # head and embedding: their gradients and what the optimiser makes of them
    assert memory.temp_size_in_bytes < 3 * 128 * NEOX * 4 + 6 * parameters < 2048 * NEOX * 4
