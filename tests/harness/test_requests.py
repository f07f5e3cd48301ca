"""Requests of lm-evaluation-harness without the harness: shared prefixes, ragged batches, greedy flags."""

import functools

import numpy as np
import pytest
from scipy import special
from small import V, drawn, forward, make
from weights import one_line

from rwkv_jax import generate
from rwkv_jax.harness import prefixes, score

RNG = np.random.default_rng(0)
DRAWN = lambda n: tuple(RNG.integers(0, V, n).tolist())
PREAMBLE = DRAWN(9)  # begins every question; the passage begins some of them
PASSAGE = PREAMBLE + DRAWN(5)
TEXTS = [PASSAGE + DRAWN(3), PREAMBLE, PASSAGE + DRAWN(1), DRAWN(5), PREAMBLE + DRAWN(6), PASSAGE + DRAWN(2)]
KINDS = pytest.mark.parametrize("kind", ["rwkv4", pytest.param("hybrid", marks=pytest.mark.slow)])


@functools.cache
def tiny(kind):
    return drawn(make(kind))


@pytest.fixture
def short_pieces(monkeypatch):
    """Prefixes in multiples of 4 tokens and segments of 8: every program has one small shape."""
    monkeypatch.setattr(prefixes, "SHARED", 4)
    monkeypatch.setattr("rwkv_jax.evaluate.SEGMENTS", (8,))


def one_pass(kind, text):
    """log p of each next token after each token of a text, [T, V]."""
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(text)] = text
    return special.log_softmax(np.float64(forward(*tiny(kind), padded)[0][0]), axis=-1)[: len(text)]


def greedy(kind, context, count):
    ids = []
    for _ in range(count):
        ids.append(int(one_pass(kind, [*context, *ids])[-1].argmax()))
    return ids


def test_shared_prefixes_are_multiples_of_32_tokens():
    a, b = (1,) * 40, (2,) * 70
    texts = [(*a, 0), (*a, 1, 5), (2,) * 31, b, (*b, 3), (7, 7)]
    assert texts == sorted(texts)
    assert prefixes.shared_prefixes(texts) == [a[:32], a[:32], (), b[:64], b[:64], ()]


@KINDS
def test_read_many_reads_each_text_as_if_alone_and_shared_prefixes_once(kind, short_pieces, monkeypatch):
    lengths = []

    def counting(model, params, texts, context):
        lengths.extend({tuple(text): len(text) for text in texts}.values())  # without rows that only fill a batch
        return generate.read(model, params, texts, context)

    monkeypatch.setattr(prefixes, "read", counting)
    many = prefixes.read_many(*tiny(kind), [*TEXTS, TEXTS[0]], batch_size=4)
    for logits_V, text in zip(many.logits_BV, [*TEXTS, TEXTS[0]], strict=True):
        np.testing.assert_allclose(special.log_softmax(np.float64(logits_V)), one_pass(kind, text)[-1], rtol=1e-4)
    assert sum(lengths) == 8 + 4 + (2 + 3) + (2 + 1) + (2 + 2) + 1 + (1 + 6) + 5


@KINDS
def test_score_equals_one_pass_for_a_ragged_batch(kind, short_pieces):
    """One call scores continuations of one token, of several, and of more than a segment, some of them greedy."""
    likely = functools.partial(greedy, kind)
    pairs = [(context, DRAWN(n)) for context, n in zip(TEXTS, (1, 4, 2, 8, 1, 7), strict=True)]
    pairs += [(context, likely(context, n)) for context, n in zip(TEXTS[:4], (1, 3, 6, 2), strict=True)]
    pairs += [(TEXTS[0], (4,)), (TEXTS[0], (5, 4)), (TEXTS[0], [*likely(TEXTS[0], 2), 0])]
    pairs += [(TEXTS[3], DRAWN(20)), (TEXTS[3], DRAWN(9)), (TEXTS[4], likely(TEXTS[4], 10))]
    scored = score(*tiny(kind), pairs, batch_size=4, progress=False)
    for (context, continuation), (nats, is_greedy) in zip(pairs, scored, strict=True):
        log_p_TV = one_pass(kind, [*context, *continuation])[len(context) - 1 : -1]
        expected = log_p_TV[np.arange(len(continuation)), np.asarray(continuation)].sum()
        np.testing.assert_allclose(nats, expected, rtol=1e-4)
        assert is_greedy == (log_p_TV.argmax(-1) == continuation).all()
    assert all(one.is_greedy for one in [*scored[6:10], scored[-1]]) and not all(one.is_greedy for one in scored)


def test_score_refuses_empty_texts():
    with one_line("nothing to score in an empty continuation"):
        score(*tiny("rwkv4"), [((1,), ())])
    with one_line("nothing to read in an empty text"):
        score(*tiny("rwkv4"), [((), (1,))])
