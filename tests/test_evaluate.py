"""Likelihoods and protocols of real models against a softmax in float64, and reductions by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import drawn
from streams import STARTS, TOKENS, carried_alone, sliding_alone, windows_alone

import rwkv_jax
from rwkv_jax import evaluate
from rwkv_jax.data import Split

SEQ_LEN = 16
KINDS = pytest.mark.parametrize("kind", ["rwkv4", pytest.param("transformer", marks=pytest.mark.slow)])
log_likelihoods = jax.jit(evaluate.log_likelihoods, static_argnums=0)


@functools.cache
def case(kind):
    return drawn(rwkv_jax.build(kind, vocab_size=256, num_layers=2, dim=8, matmul_precision="highest"))


@functools.cache
def reader(kind):
    """A function from tokens to the nats of tokens[1:], by one pass over them alone and a softmax in float64."""
    model, params = case(kind)
    forward = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT)[0])

    def nats_of(tokens):
        padded = np.zeros((1, len(TOKENS)), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(padded), np.float64)[0, : len(tokens) - 1]
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -log_p[np.arange(len(tokens) - 1), np.asarray(tokens[1:], int)]

    return nats_of


def alike(actual, expected):
    return error_ratio(actual, expected) < 1e-6


def check_stream(nats, expected):
    assert nats.dtype == np.float32 and np.isnan(nats[0])
    assert alike(nats[1:], expected)


# Real models


@KINDS
def test_log_likelihoods_are_the_log_softmax_under_masks(kind):
    nats_of = reader(kind)
    assert len(TOKENS) > evaluate.POSITIONS + 1  # positions need more than one group
    padded = np.concatenate([TOKENS[1:5], [9, 9, 9], TOKENS[5:149]])
    tokens_BT = np.stack([TOKENS, TOKENS[::-1], TOKENS, padded])
    reset_BT, valid_BT = np.zeros((4, 150), bool), np.ones((4, 150), bool)
    reset_BT[2, 7] = True
    valid_BT[3, 4:7] = False
    loglik_BT, _ = log_likelihoods(*case(kind), tokens_BT, reset_BT=reset_BT, valid_BT=valid_BT)
    assert loglik_BT.shape == (4, 150) and loglik_BT.dtype == jnp.float32
    plain, backward, reset, invalid = -np.asarray(loglik_BT)
    assert alike(plain, nats_of(TOKENS))
    assert alike(backward, nats_of(TOKENS[::-1]))
    assert alike(reset, np.concatenate([nats_of(TOKENS[:8]), nats_of(TOKENS[7:])]))
    expected = nats_of(TOKENS[1:149])  # entry 3 of the padded text has padding for its target
    assert alike(invalid[:3], expected[:3]) and alike(invalid[7:], expected[4:])


@pytest.mark.slow
def test_log_likelihoods_of_bfloat16_are_float32_and_sum_to_one():
    model, params = case("rwkv4")
    past = np.broadcast_to(TOKENS[:5], (256, 5))
    tokens_BT = np.concatenate([past, np.arange(256)[:, None]], axis=1)
    loglik_BT, _ = log_likelihoods(model.clone(dtype="bfloat16"), params, tokens_BT)
    assert loglik_BT.dtype == jnp.float32
    assert np.exp(np.asarray(loglik_BT[:, -1], np.float64)).sum() == pytest.approx(1, abs=1e-4)


@KINDS
def test_windows_and_best_practice_score_each_window_or_document_alone(kind):
    check_stream(evaluate.windows(*case(kind), TOKENS, SEQ_LEN, 4), windows_alone(reader(kind), SEQ_LEN))
    best = evaluate.best_practice(*case(kind), TOKENS, STARTS, SEQ_LEN, 3)
    check_stream(best, carried_alone(reader(kind)) if kind == "rwkv4" else sliding_alone(reader(kind), SEQ_LEN))


# Reductions


def test_per_document_excludes_separators():
    split = Split(np.zeros(9, np.uint8), np.array([0, 4, 5]), ("a", "empty", "b"), 6)
    nats, num_bytes = evaluate.per_document(np.array([np.nan, 1, 2, 3, 100, 200, 4, 5, 6]), split)
    np.testing.assert_array_equal(nats, [6, 0, 15])
    np.testing.assert_array_equal(num_bytes, [3, 0, 3])
    assert evaluate.bits_per_byte(nats, num_bytes) == pytest.approx(21 / np.log(2) / 6)
    with pytest.raises(ValueError, match="8 nats for a split of 9"):
        evaluate.per_document(np.zeros(8), split)


def test_bits_per_byte_perplexity_and_per_document_refuse_empty_input():
    for call in (
        lambda: evaluate.bits_per_byte(np.zeros(3), 0),
        lambda: evaluate.bits_per_byte([], []),
        lambda: evaluate.perplexity([]),
        lambda: evaluate.per_document(np.zeros(2), Split(np.zeros(2, np.uint8), np.arange(2), (), 0)),
        lambda: evaluate.per_document(np.zeros(2), Split(np.arange(2), np.zeros(1, int), (), None)),
    ):
        with pytest.raises(ValueError, match=r"^(0 bytes|no tokens|the split has (0|None) bytes)"):
            call()


def test_perplexity_beyond_the_range_of_a_float_is_infinite():
    assert evaluate.perplexity([1e4]) == np.inf
