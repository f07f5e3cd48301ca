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


def _value_and_gradients(chunk, dtype=np.float64):
    *operands, targets_BT, mask_BT = _drawn(dtype)

    def objective(x_BTD, kernel_DV):
        nll_BT, penalty_BT = optim.token_losses(lambda x: x @ kernel_DV, x_BTD, targets_BT, chunk)
        assert nll_BT.shape == penalty_BT.shape == (B, T)
        return jnp.where(mask_BT, nll_BT + 1e3 * penalty_BT, 0).sum(), (nll_BT, penalty_BT)

    (_, losses), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(*operands)
    return losses, gradients


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [1, 5, 18, 35])  # one token, a ragged last chunk, two halves, all but one
def test_chunks_change_neither_losses_nor_gradients(chunk):
    """A token's own numbers and its gradient sum over D and V alone; the head's gradient sums N tokens in another
    order, off by at most N rounding errors of its largest partial sum."""
    (nll, penalty), (dx, dkernel) = _value_and_gradients(chunk)
    (nll0, penalty0), (dx0, dkernel0) = _value_and_gradients(B * T)
    eps = np.finfo(np.float64).eps
    assert error_ratio(nll, nll0) < D * eps and error_ratio(penalty, penalty0) < D * eps
    assert error_ratio(dx, dx0) < V * eps
    assert error_ratio(dkernel, dkernel0) < B * T * eps


def test_the_loss_of_a_token_is_minus_the_log_of_its_probability():
    x_BTD, kernel_DV, targets_BT, _ = _drawn(np.float64)
    logits_BTV = x_BTD @ kernel_DV
    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    (nll_BT, penalty_BT), _ = _value_and_gradients(5, np.float32)
    expected = -np.log(np.take_along_axis(p_BTV, targets_BT[..., None], -1)[..., 0])
    assert error_ratio(nll_BT, expected) < 1e-6
    assert error_ratio(penalty_BT, 0.5e-4 * logits_BTV.max(-1) ** 2) < 1e-6


def _tokens_with_logits(jaxpr, vocab_size):
    """Tokens of every array with a vocabulary axis, but the head and the embedding [D, V]."""
    shapes = set(re.findall(rf"\[([\d,]+),{vocab_size}\]", str(jaxpr))) - {str(D)}
    return {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}


@pytest.mark.parametrize("vocab_size, chunk, expected", [(NEOX, None, 1024), (NEOX, 100, 100), (256, None, 8192)])
def test_a_large_vocabulary_is_chunked_and_a_small_one_is_not(vocab_size, chunk, expected):
    """2^26 / 50,277 is 1,334 tokens: an eighth of 8,192 is the largest power-of-two share below."""

    def objective(x_BTD, kernel_DV, targets_BT):
        return sum(x.sum() for x in optim.token_losses(lambda x: x @ kernel_DV, x_BTD, targets_BT, chunk))

    shape = jax.ShapeDtypeStruct
    operands = shape((8, 1024, D), jnp.float32), shape((D, vocab_size), jnp.float32), shape((8, 1024), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(*operands)
    assert _tokens_with_logits(jaxpr, vocab_size) - {1} == {expected}  # and one [1, V] of taking targets
    assert str(jaxpr).count("= dot_general") == 3 + (vocab_size == NEOX)  # computed twice only where chunked


def test_the_memory_of_a_step_is_that_of_its_chunk():
    """Logits, their softmax and its cotangent live together for 128 tokens of 2,048."""
    model, tx = models.build("rwkv4", vocab_size=NEOX, num_layers=1, dim=D), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    shape = lambda length, dtype: jax.ShapeDtypeStruct((8, length), dtype)
    rows = {"tokens": shape(257, jnp.int32), "mask": shape(256, bool)}
    step = jax.jit(train.make_step(model, tx, loss_chunk=128), donate_argnums=0)
    traced = step.trace(state, rows, jax.ShapeDtypeStruct((), jnp.float32))
    assert max(_tokens_with_logits(traced.jaxpr, NEOX)) == 128
    memory = traced.lower().compile().memory_analysis()
    parameters = 2 * D * NEOX * 4  # head and embedding: their gradients and what the optimiser makes of them
    assert memory.temp_size_in_bytes < 3 * 128 * NEOX * 4 + 6 * parameters < 2048 * NEOX * 4
