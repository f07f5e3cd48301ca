"""Requests of lm-evaluation-harness without the harness: shared beginnings, ragged batches, greedy flags."""

import jax
import numpy as np
import pytest
from small import V, forward, made

from rwkv_jax import generate
from rwkv_jax.generate import prefixes
from rwkv_jax.harness import last_words, score

RNG = np.random.default_rng(0)
DRAWN = lambda n: tuple(RNG.integers(0, V, n).tolist())
PREAMBLE = DRAWN(70)  # of all questions; the passage, of some of them
PASSAGE = PREAMBLE + DRAWN(40)
TEXTS = [PASSAGE + DRAWN(9), PREAMBLE, PASSAGE + DRAWN(3), DRAWN(15), PREAMBLE + DRAWN(24), PASSAGE + DRAWN(1)]


def one_pass(text):
    """log p of every next token after each token of a text, [T, V]."""
    padded = np.zeros((1, 160), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(jax.nn.log_softmax(forward(*made("rwkv4"), padded)[0]))[0, : len(text)]


def by_one_pass(context, continuation):
    """Nats of a continuation and whether it is greedy."""
    log_p = one_pass([*context, *continuation])[len(context) - 1 : -1]
    nats = log_p[np.arange(len(continuation)), np.asarray(continuation)].sum()
    return nats, bool((log_p.argmax(-1) == continuation).all())


def greedy(context, count):
    ids = []
    for _ in range(count):
        ids.append(int(one_pass([*context, *ids])[-1].argmax()))
    return ids


def test_beginnings_are_shared_in_multiples():
    a, b = (1,) * 40, (2,) * 70
    texts = [(*a, 0), (*a, 1, 5), (2,) * 31, b, (*b, 3), (7, 7)]
    assert texts == sorted(texts)
    assert prefixes.shared_beginnings(texts) == [a[:32], a[:32], (), b[:64], b[:64], ()]


def test_many_texts_are_read_as_if_each_were_alone_and_what_they_share_once(monkeypatch):
    model, params = made("rwkv4")
    lengths = []

    def counting(model, params, texts, context):
        lengths.extend({tuple(text): len(text) for text in texts}.values())  # without the rows that fill a batch
        return generate.read(model, params, texts, context)

    monkeypatch.setattr(prefixes, "read", counting)
    many = prefixes.read_many(model, params, [*TEXTS, TEXTS[0]], batch_size=4)
    for log_p_V, text in zip(jax.nn.log_softmax(many.logits_BV), [*TEXTS, TEXTS[0]], strict=True):
        np.testing.assert_allclose(log_p_V, one_pass(text)[-1], rtol=1e-4)
    assert sum(lengths) == 64 + 32 + (14 + 9) + (14 + 3) + (14 + 1) + 6 + (6 + 24) + 15
    assert sum(lengths) < sum(map(len, TEXTS)) / 2


def test_scores_are_those_of_one_pass_whatever_the_batch():
    pairs = [(context, DRAWN(n)) for context, n in zip(TEXTS, (1, 4, 2, 30, 1, 7), strict=True)]
    pairs += [(context, greedy(context, n)) for context, n in zip(TEXTS[:4], (1, 3, 6, 2), strict=True)]
    pairs += [(TEXTS[0], (4,)), (TEXTS[0], (5, 4)), (TEXTS[0], [*greedy(TEXTS[0], 2), 0])]
    scored = score(*made("rwkv4"), pairs, batch_size=4, progress=False)
    expected = [by_one_pass(*pair) for pair in pairs]
    np.testing.assert_allclose([one.nats for one in scored], [nats for nats, _ in expected], rtol=1e-4)
    assert [one.is_greedy for one in scored] == [flag for _, flag in expected]
    assert all(one.is_greedy for one in scored[6:10]) and not all(one.is_greedy for one in scored)


def test_a_long_continuation_is_read_in_segments(monkeypatch):
    pairs = [(TEXTS[3], DRAWN(120)), (TEXTS[3], DRAWN(2))]
    monkeypatch.setattr("rwkv_jax.evaluate.SEGMENT", 32)  # a shape that the test before has compiled
    scored = score(*made("rwkv4"), pairs, batch_size=4)
    np.testing.assert_allclose([one.nats for one in scored], [by_one_pass(*pair)[0] for pair in pairs], rtol=1e-4)


@pytest.mark.slow
def test_caches_of_attention_are_forked_too():
    model, params = made("hybrid")
    many = prefixes.read_many(model, params, TEXTS, batch_size=4)
    for row, text in enumerate(TEXTS):
        alone = generate.read(model, params, text)
        np.testing.assert_allclose(many.logits_BV[row], alone.logits_BV[0], rtol=1e-4, atol=1e-5)
    pair = (TEXTS[0], generate.generate(model, params, TEXTS[0], max_new_tokens=5, temperature=0))
    assert score(model, params, [pair, (TEXTS[1], DRAWN(3))], batch_size=2)[0].is_greedy


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="nothing to score in an empty continuation"):
        score(*made("rwkv4"), [((1,), ())])
    with pytest.raises(ValueError, match="nothing to read in an empty text"):
        score(*made("rwkv4"), [((), (1,))])


def test_the_last_word_has_its_space():
    assert last_words(["a b  c", "the end"]) == [("a b ", " c"), ("the", " end")]
    for text in ("word", "ends in a space ", " word"):
        with pytest.raises(ValueError, match="no last word in"):
            last_words([text])
