"""Protocols of evaluation, judged in NumPy by a model whose nats are a hash of the tokens read so far."""

import numpy as np
import pytest
import streams
from streams import STARTS, TOKENS, HashModel, carried_alone, sliding_alone, windows_alone

from rwkv_jax import evaluate


@pytest.fixture(autouse=True)
def likelihoods_of_the_fake(monkeypatch):
    monkeypatch.setattr(evaluate, "_log_likelihoods", streams.log_likelihoods)
    monkeypatch.setattr(evaluate, "_judged", streams.judged)


def check(nats, expected, model, batch_size, seq_len):
    assert nats.dtype == np.float32 and np.isnan(nats[0])
    np.testing.assert_array_equal(nats[1:], expected)
    [(tokens, *_)] = set(model.calls)  # one shape for all calls, the last one included
    assert tokens == (batch_size, seq_len + 1)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(16, 4), (15, 1), (1, 7), (150, 2), (200, 1)])
def test_windows_each_start_with_an_empty_past(seq_len, batch_size):
    model = HashModel(recurrent=False)
    nats = evaluate.windows(model, {}, TOKENS, seq_len, batch_size)
    check(nats, windows_alone(model.nats_of, seq_len), model, batch_size, seq_len)


def test_windows_begin_from_the_given_state():
    model, prefix = HashModel(), [5, 6, 7]
    *_, [state] = model.judged({}, np.array([[*prefix, 0]], np.int32))
    model.calls.clear()
    nats = evaluate.windows(model, {}, TOKENS, 16, 4, np.full(4, state))
    after_prefix = lambda tokens: model.nats_of([*prefix, *tokens])[3:]
    check(nats, windows_alone(after_prefix, 16), model, 4, 16)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(15, 1), (16, 4), (1, 7), (150, 2), (200, 1)])
def test_sliding_predicts_from_half_a_window_or_the_whole_document(seq_len, batch_size):
    model = HashModel(recurrent=False)
    nats = evaluate.sliding(model, {}, TOKENS, STARTS, seq_len, batch_size)
    check(nats, sliding_alone(model.nats_of, seq_len), model, batch_size, seq_len)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(16, 1), (16, 3), (16, 20), (7, 2), (200, 2)])
def test_carried_predicts_from_the_whole_document(seq_len, batch_size):
    model = HashModel()
    nats = evaluate.carried(model, {}, TOKENS, STARTS, seq_len, batch_size)
    check(nats, carried_alone(model.nats_of), model, min(batch_size, len(STARTS)), seq_len)


def test_carried_rows_are_balanced():
    lengths = np.array([5, 9, 1, 4, 4, 1, 8])
    rows = evaluate._balanced(lengths, 3)
    assert sorted(document for row in rows for document in row) == list(range(7))
    assert max(lengths[row].sum() for row in rows) <= 12  # 32 tokens in 3 rows


def test_best_practice_is_carried_for_recurrent_models_and_sliding_for_others():
    for recurrent, protocol in ((True, evaluate.carried), (False, evaluate.sliding)):
        arguments = (HashModel(recurrent), {}, TOKENS, STARTS, 16, 3)
        np.testing.assert_array_equal(evaluate.best_practice(*arguments), protocol(*arguments))
    with pytest.raises(ValueError, match="expected none whose state grows"):
        evaluate.carried(HashModel(recurrent=False), {}, TOKENS, STARTS, 16, 3)


@pytest.mark.parametrize(("longest", "segment"), [(2, 4), (5, 4), (33, 32), (34, 128), (600, 512)])
def test_continuations_read_texts_of_any_lengths_in_segments(longest, segment):
    model, prefix, rng = HashModel(), [5, 6, 7], np.random.default_rng(0)
    *_, [state] = model.judged({}, np.array([[*prefix, 0]], np.int32))
    model.calls.clear()
    texts = [rng.integers(0, 256, length).tolist() for length in (1, longest, 2)]
    logits_BV = rng.standard_normal((3, 256)).astype(np.float32)
    log_p_BV = np.log(np.exp(logits_BV) / np.exp(logits_BV).sum(axis=1, keepdims=True))
    logits_BV[2, texts[2][0]] = 50
    log_p_BV[2] = logits_BV[2] - 50
    found = evaluate.continuations(model, {}, texts, logits_BV, np.full(3, state))
    for text, (nats, likeliest), log_p_V in zip(texts, found, log_p_BV, strict=True):
        assert nats.dtype == np.float32 and likeliest.dtype == bool and len(nats) == len(likeliest) == len(text)
        assert nats[0] == pytest.approx(log_p_V[text[0]], abs=1e-5) and likeliest[0] == (text is texts[2])
        expected = -model.nats_of([*prefix, *text])[3:]
        np.testing.assert_array_equal(nats[1:], expected)
        np.testing.assert_array_equal(likeliest[1:], expected > -0.5)
    [(tokens, *_)] = set(model.calls)
    assert tokens == (3, segment + 1)
    with pytest.raises(ValueError, match="nothing to score in an empty text"):
        evaluate.continuations(model, {}, [[1], []], logits_BV[:2], np.full(2, state))


def test_protocols_refuse_input_that_they_cannot_score():
    model = HashModel()
    with pytest.raises(ValueError, match="1 tokens, expected at least 2"):
        evaluate.windows(model, {}, TOKENS[:1], 16, 4)
    with pytest.raises(ValueError, match="seq_len is 0"):
        evaluate.windows(model, {}, TOKENS, 0, 4)
    with pytest.raises(ValueError, match="batch_size 0"):
        evaluate.windows(model, {}, TOKENS, 16, 0)
    with pytest.raises(ValueError, match="token 256 is outside the model's vocabulary of 256"):
        evaluate.windows(model, {}, np.array([0, 256]), 16, 4)
    with pytest.raises(ValueError, match="token 0 at every start"):
        evaluate.best_practice(model, {}, TOKENS, STARTS + 1, 16, 4)
