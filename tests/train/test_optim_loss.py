"""`optim.losses_of_head`, the loss in chunks of tokens: equal numbers, without the logits of all tokens at once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio

from rwkv_jax import models, train
from rwkv_jax.train import optim

B, T, D, V = 4, 9, 8, 13
CHUNKS = (None, 1, 5, 18, 35)  # all, one token, a ragged last, two halves, all but one
NEOX = 50_277


def _drawn(dtype):
    rng = np.random.default_rng(0)
    x_BTD, kernel_DV = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    mask_BT = rng.random((B, T)) < 0.7
    return x_BTD.astype(dtype), kernel_DV.astype(dtype), rng.integers(0, V, (B, T)), mask_BT


def _head(kernel_DV, x_ND):
    return x_ND @ kernel_DV


def _objective(x_BTD, kernel_DV, targets_BT, mask_BT, **options):
    total, nll = optim.losses_of_head(_head, kernel_DV, x_BTD, targets_BT, mask_BT, **options)
    return 2 * total, (total, nll)


def _value_and_gradients(*operands, **options):
    """((objective, nll), gradients of twice the objective by x and the kernel)."""
    (_, losses), gradients = jax.value_and_grad(_objective, (0, 1), has_aux=True)(*operands, **options)
    return losses, gradients


def _expected(x_BTD, kernel_DV, targets_BT, mask_BT):
    """The expected values by the definition and its derivative, in NumPy."""
    logits_BTV, one_hot_BTV = x_BTD @ kernel_DV, np.eye(V)[targets_BT]
    largest_BT1 = logits_BTV.max(-1, keepdims=True)
    log_p_BTV = logits_BTV - largest_BT1
    log_p_BTV -= np.log(np.exp(log_p_BTV).sum(-1, keepdims=True))
    nll = -(log_p_BTV * one_hot_BTV).sum(-1)[mask_BT].sum()
    penalty = 0.5e-4 * np.square(largest_BT1[..., 0])[mask_BT].sum()
    dlogits_BTV = np.exp(log_p_BTV) - one_hot_BTV + 1e-4 * largest_BT1 * (logits_BTV == largest_BT1)
    dlogits_BTV *= 2 * mask_BT[..., None]
    return (nll + penalty, nll), (dlogits_BTV @ kernel_DV.T, np.einsum("btd,btv->dv", x_BTD, dlogits_BTV))


@pytest.mark.usefixtures("x64")
def test_losses_of_head_equal_the_definition_for_every_chunk():
    """A token's gradient is a sum over V alone. The others sum N tokens in another order, off by at most N rounding
    errors of their largest partial sum."""
    operands = _drawn(np.float64)
    by_chunk = jax.jit(lambda *operands: [_value_and_gradients(*operands, chunk=chunk) for chunk in CHUNKS])
    expected, (dx0, dkernel0) = _expected(*operands)
    eps = np.finfo(np.float64).eps
    for losses, (dx, dkernel) in by_chunk(*operands):
        np.testing.assert_allclose(losses, expected, rtol=B * T * eps)
        assert error_ratio(dx, dx0) < V * eps
        assert error_ratio(dkernel, dkernel0) < B * T * eps


def test_losses_of_head_without_the_penalty_have_the_loss_as_objective():
    operands = _drawn(np.float32)
    total, nll = jax.jit(lambda *operands: _objective(*operands, chunk=5, penalised=False)[1])(*operands)
    assert total == nll == pytest.approx(float(_expected(*operands)[0][1]), rel=1e-6)


def test_losses_of_head_sum_gradients_of_a_bfloat16_head_in_float32():
    """36 chunks of a token each: in bfloat16 every step of the sum would lose the part below 2^-8 of it."""
    x_BTD, kernel_DV, targets_BT, mask_BT = _drawn(jnp.bfloat16)

    @jax.jit
    def gradients(wide_DV):
        gradient = jax.grad(
            lambda kernel_DV, chunk: _objective(x_BTD, kernel_DV, targets_BT, mask_BT, chunk=chunk, penalised=False)[0]
        )
        return gradient(wide_DV, 1), gradient(wide_DV, B * T), gradient(wide_DV.astype(jnp.bfloat16), 1)

    apart, together, narrow = gradients(kernel_DV.astype(np.float32))
    assert apart.dtype == np.float32 and narrow.dtype == jnp.bfloat16
    assert error_ratio(apart, together) < 2**-8


# -------------------------------------------------------------------------------------------------- memory


def _tokens_with_logits(jaxpr, vocab_size):
    """Numbers of tokens of all arrays with a vocabulary axis, except the head and the embedding [D, V]."""
    shapes = set(re.findall(rf"\[([\d,]+),{vocab_size}\]", str(jaxpr))) - {str(D)}
    return {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}


@pytest.mark.parametrize("vocab_size, chunk, expected", [(NEOX, None, 2048), (NEOX, 100, 100), (256, None, 8192)])
def test_losses_of_head_split_a_large_vocabulary_into_chunks(vocab_size, chunk, expected):
    """2^27 / 50,277 is 2,669 tokens: a quarter of 8,192 is the largest power-of-two share below."""

    def objective(x_BTD, kernel_DV, targets_BT):
        return _objective(x_BTD, kernel_DV, targets_BT, np.ones((8, 1024), bool), chunk=chunk)[0]

    shape = jax.ShapeDtypeStruct
    operands = shape((8, 1024, D), jnp.float32), shape((D, vocab_size), jnp.float32), shape((8, 1024), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(*operands)
    assert _tokens_with_logits(jaxpr, vocab_size) - {1} == {expected}  # and one [1, V], from taking the targets
    assert str(jaxpr).count("= dot_general") == 3  # logits are computed once


def test_step_has_logits_of_one_chunk_with_a_multiple_of_8_columns():
    """A step on 2,048 tokens, with the loss of 128 at a time."""
    fields = {"num_layers": 1, "dim": D, "receptance": False, "token_shift": False}
    model, tx = models.build("rwkv4", vocab_size=117, **fields), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    shape = lambda length, dtype: jax.ShapeDtypeStruct((8, length), dtype)
    rows = {"tokens": shape(257, jnp.int32), "mask": shape(256, bool)}
    jaxpr = jax.make_jaxpr(train.make_step(model, tx, loss_chunk=128))(
        state, rows, jax.ShapeDtypeStruct((), jnp.float32)
    )
    assert max(_tokens_with_logits(jaxpr, 120)) == 128
