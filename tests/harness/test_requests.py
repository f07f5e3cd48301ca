"""Requests of lm-evaluation-harness without the harness: shared beginnings, ragged batches, greedy flags."""

import functools

import numpy as np
import pytest
from small import V, drawn, forward, make
from weights import one_line

from rwkv_jax import generate
from rwkv_jax.harness import last_words, prefixes, score

RNG = np.random.default_rng(0)
DRAWN = lambda n: tuple(RNG.integers(0, V, n).tolist())
PREAMBLE = DRAWN(9)  # of all questions; the passage, of some of them
PASSAGE = PREAMBLE + DRAWN(5)
TEXTS = [PASSAGE + DRAWN(3), PREAMBLE, PASSAGE + DRAWN(1), DRAWN(5), PREAMBLE + DRAWN(6), PASSAGE + DRAWN(2)]


@functools.cache
def tiny(kind="rwkv4"):
    return drawn(make(kind))


@pytest.fixture
def short_pieces(monkeypatch):
    """Beginnings in multiples of 4 tokens and segments of 8: every program reads one small shape."""
    monkeypatch.setattr(prefixes, "SHARED", 4)
    monkeypatch.setattr("rwkv_jax.evaluate.SEGMENTS", (8,))


def log_softmax(logits_TV):
    logits_TV = np.asarray(logits_TV, np.float64)
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def one_pass(text):
    """log p of every next token after each token of a text, [T, V]."""
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(text)] = text
    return log_softmax(forward(*tiny(), padded)[0][0])[: len(text)]


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


def test_shared_prefixes_are_multiples_of_32_tokens():
    a, b = (1,) * 40, (2,) * 70
    texts = [(*a, 0), (*a, 1, 5), (2,) * 31, b, (*b, 3), (7, 7)]
    assert texts == sorted(texts)
    assert prefixes.shared_prefixes(texts) == [a[:32], a[:32], (), b[:64], b[:64], ()]


def test_read_many_reads_each_text_as_if_alone_and_shared_prefixes_once(short_pieces, monkeypatch):
    model, params = tiny()
    lengths = []

    def counting(model, params, texts, context):
        lengths.extend({tuple(text): len(text) for text in texts}.values())  # without the rows that fill a batch
        return generate.read(model, params, texts, context)

    monkeypatch.setattr(prefixes, "read", counting)
    many = prefixes.read_many(model, params, [*TEXTS, TEXTS[0]], batch_size=4)
    for log_p_V, text in zip(log_softmax(many.logits_BV), [*TEXTS, TEXTS[0]], strict=True):
        np.testing.assert_allclose(log_p_V, one_pass(text)[-1], rtol=1e-4)
    assert sum(lengths) == 8 + 4 + (2 + 3) + (2 + 1) + (2 + 2) + 1 + (1 + 6) + 5
    assert sum(lengths) < sum(map(len, TEXTS)) / 2


def test_score_equals_one_pass_whatever_the_batch(short_pieces):
    """Continuations of one token, of several, of more than a segment; of which some are greedy; all in one call."""
    pairs = [(context, DRAWN(n)) for context, n in zip(TEXTS, (1, 4, 2, 8, 1, 7), strict=True)]
    pairs += [(context, greedy(context, n)) for context, n in zip(TEXTS[:4], (1, 3, 6, 2), strict=True)]
    pairs += [(TEXTS[0], (4,)), (TEXTS[0], (5, 4)), (TEXTS[0], [*greedy(TEXTS[0], 2), 0])]
    pairs += [(TEXTS[3], DRAWN(20)), (TEXTS[3], DRAWN(9)), (TEXTS[4], greedy(TEXTS[4], 10))]
    scored = score(*tiny(), pairs, batch_size=4, progress=False)
    expected = [by_one_pass(*pair) for pair in pairs]
    np.testing.assert_allclose([one.nats for one in scored], [nats for nats, _ in expected], rtol=1e-4)
    assert [one.is_greedy for one in scored] == [flag for _, flag in expected]
    assert all(one.is_greedy for one in [*scored[6:10], scored[-1]]) and not all(one.is_greedy for one in scored)


@pytest.mark.slow
def test_read_many_and_score_fork_caches_of_attention(short_pieces):
    model, params = tiny("hybrid")
    many = prefixes.read_many(model, params, TEXTS, batch_size=4)
    for row, text in enumerate(TEXTS):
        alone = generate.read(model, params, text)
        np.testing.assert_allclose(many.logits_BV[row], alone.logits_BV[0], rtol=1e-4, atol=1e-5)
    pair = (TEXTS[0], generate.generate(model, params, TEXTS[0], max_new_tokens=5, temperature=0))
    assert score(model, params, [pair, (TEXTS[1], DRAWN(3))], batch_size=2)[0].is_greedy


def test_score_refuses_empty_texts():
    with one_line("nothing to score in an empty continuation"):
        score(*tiny(), [((1,), ())])
    with one_line("nothing to read in an empty text"):
        score(*tiny(), [((), (1,))])


def test_last_words_keep_their_space():
    assert last_words(["a b  c", "the end"]) == [("a b ", " c"), ("the", " end")]
    for text in ("word", "ends in a space ", " word"):
        with one_line("no last word in"):
            last_words([text])
