"""The filters of samplers against their definitions in NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from logits import (
    CASES,
    INF,
    LOGITS,
    NEUTRAL,
    ROWS,
    V,
    add,
    filtered,
    jitted_distribution,
    kept,
    probabilities,
    scores,
    text,
)
from scipy import special

from rwkv_jax.generate import filters
from rwkv_jax.generate.sampling import history, sampler

ROUNDING = 1e-5  # of sums of float32 probabilities: which token crosses a limit is open where it is this near
SHARE = st.floats(0.01, 0.99)


def assert_smallest(kept_V, order, p_V, share):
    """The first tokens of an order, as few as reach a share of the probability."""
    size = kept_V.sum()
    assert size and kept_V[order[:size]].all()
    sum_V = np.cumsum(p_V[order])
    assert sum_V[size - 1] >= share - ROUNDING
    assert size == 1 or sum_V[size - 2] < share + ROUNDING


@CASES
@given(LOGITS, st.integers(1, V + 3))
def test_top_k_keeps_the_likeliest_k(logits_V, k):
    expected = np.zeros(V, bool)
    expected[np.argsort(-logits_V, kind="stable")[:k]] = True
    np.testing.assert_array_equal(kept(logits_V, top_k=k), expected & (logits_V > -INF))


@CASES
@given(LOGITS, SHARE, st.sampled_from([0.5, 1.0, 2.0]))
@example(np.zeros(V, np.float32), 0.5, 1.0)
def test_top_p_keeps_the_smallest_set_of_that_share(logits_V, top_p, temperature):
    kept_V = kept(logits_V, top_p=top_p, temperature=temperature)
    assert_smallest(kept_V, np.argsort(-logits_V, kind="stable"), probabilities(logits_V / temperature), top_p)


def test_top_p_keeps_the_token_that_crosses_it():
    logits_V = np.log(np.float32([0.125, 0.5, 0.125, 0.25]))
    for top_p, expected in ((0.4, [1]), (0.6, [1, 3]), (0.8, [0, 1, 3]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(kept(logits_V, top_p=top_p)).tolist() == expected


@CASES
@given(LOGITS, SHARE)
def test_min_p_keeps_that_share_of_the_largest_probability(logits_V, min_p):
    p_V = probabilities(logits_V)
    ratio_V, kept_V = p_V / p_V.max(), kept(logits_V, min_p=min_p)
    assert kept_V[ratio_V >= min_p * (1 + ROUNDING)].all() and not kept_V[ratio_V < min_p * (1 - ROUNDING)].any()


@CASES
@given(LOGITS, SHARE)
def test_typical_p_keeps_the_tokens_nearest_to_the_entropy(logits_V, typical_p):
    p_V = probabilities(logits_V)
    surprise_V = -special.log_softmax(np.float64(logits_V))
    distance_V = np.abs(surprise_V - special.entr(p_V).sum())
    left_V = filtered(logits_V, typical_p=typical_p)
    assert left_V.max() == 0  # or a small temperature that comes last overflows
    kept_V = np.isfinite(left_V)
    near = 20 * ROUNDING  # distances that float32 cannot tell apart come in either order
    assert not kept_V[p_V == 0].any()
    assert kept_V.all() or distance_V[kept_V].max() <= distance_V[~kept_V].min() + near
    mass = p_V[kept_V].sum()
    removable = p_V[kept_V & (distance_V >= distance_V[kept_V].max() - near)].max()
    assert mass >= typical_p - ROUNDING and mass - removable < typical_p + ROUNDING
    for value in np.unique(logits_V[kept_V]):
        of_equal = kept_V[logits_V == value]
        assert of_equal[: of_equal.sum()].all()


def test_typical_p_prefers_a_surprise_like_the_entropy():
    logits_V = np.log(np.float32([0.6, 0.2, 0.1, 0.1]))
    # entropy 1.089; surprises 0.511, 1.609, 2.303: distances 0.578, 0.521, 1.214
    assert np.flatnonzero(kept(logits_V, typical_p=0.1)).tolist() == [1]
    assert np.flatnonzero(kept(logits_V, typical_p=0.3)).tolist() == [0, 1]
    assert np.flatnonzero(kept(logits_V, typical_p=0.85)).tolist() == [0, 1, 2]


@settings(CASES, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2.0**-3, 2.0**-18]))
def test_vocabularies_of_many_blocks_are_filtered_exactly(seed, grain):
    """With ties and without."""
    size = 3 * filters.LANES + 7
    logits_V = np.random.default_rng(seed).normal(scale=2, size=size).astype(np.float32)
    logits_V = np.round(logits_V / grain).astype(np.float32) * np.float32(grain)
    order = np.argsort(-logits_V, kind="stable")

    def kept(**options):
        chosen = sampler(**{"top_k": size, "top_p": NEUTRAL["top_p"]} | options)
        return np.isfinite(np.asarray(jitted_distribution(chosen, logits_V[None], None)))[0]

    for k in (1, 40, 700):
        assert set(np.flatnonzero(kept(top_k=k))) == set(order[:k])
    for top_p in (0.1, 0.9, 0.999):
        assert_smallest(kept(top_p=top_p), order, probabilities(logits_V), top_p)


@CASES
@given(LOGITS, st.sampled_from([0.25, 1.0, 3.0]), st.booleans())
def test_temperature_divides_the_logits(logits_V, temperature, last):
    actual_V = filtered(logits_V, temperature=temperature, temperature_last=last)
    assert actual_V.max() == 0
    np.testing.assert_allclose(probabilities(actual_V), probabilities(logits_V / np.float64(temperature)), atol=1e-6)


def test_filters_act_in_the_documented_order():
    logits_V = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
    kept_of = lambda **options: kept(logits_V, **NEUTRAL | options)
    assert kept_of().all() and kept_of(temperature_last=True).all()
    # of two tokens 0.4 is a share of 0.57; of all it is not
    assert kept_of(top_k=2, top_p=0.5).tolist() == [True, False, False, False]
    assert kept_of(top_k=2, top_p=0.5, temperature_last=True).tolist() == [True, True, False, False]
    # of temperature 2 the shares are 0.31 0.27 0.22 0.16
    assert kept_of(top_p=0.65, temperature=2).sum() == 3
    assert kept_of(top_p=0.65, temperature=2, temperature_last=True).sum() == 2
    assert kept_of(min_p=0.4, temperature=2).sum() == 4
    assert kept_of(min_p=0.4, temperature=2, temperature_last=True).sum() == 3
    # nearest to the entropy of all four, 1.28, is token 1; of the first two, it is token 1 as well; of one, that one
    assert kept_of(typical_p=0.1).tolist() == [False, True, False, False]
    assert kept_of(typical_p=0.1, min_p=0.9).tolist() == [True, False, False, False]
    # the first token falls behind the second before top-k
    off = {"presence_penalty": 1e-9, "frequency_penalty": 1e-9, "logit_bias": {9: 0.0}, "bad_words_ids": [[8], [9]]}
    penalised = NEUTRAL | off | {"repetition_penalty": 2.0, "top_k": 1}
    assert kept(np.float32([1, 0.8, 0, 0]), text([0]), **penalised).tolist() == [False, True, False, False]


# -------------------------------------------------------------------------------------------------- scores


def after(at, *tokens):
    for token in tokens:
        at = add(at, np.full(ROWS, token, np.int32))
    return at


def test_penalties_change_the_scores_of_tokens_in_the_text():
    at = after(text([0, 1], decay=0.5), 2, 3, 3)  # counts: 0, 0, 1/4, 3/2, 0
    logits = [2.0, -2.0, 2.0, -2.0, 1.0]
    np.testing.assert_array_equal(scores(logits, at, repetition_penalty=4.0), [0.5, -8, 0.5, -8, 1])
    np.testing.assert_array_equal(scores(logits, at, presence_penalty=0.5), [2, -2, 1.5, -2.5, 1])
    np.testing.assert_array_equal(scores(logits, at, frequency_penalty=2.0), [2, -2, 1.5, -5, 1])
    together = scores(logits, at, repetition_penalty=4.0, presence_penalty=0.5, frequency_penalty=-2.0)
    np.testing.assert_array_equal(together, [0.5, -8, 0.5, -5.5, 1])
    # a bias comes before the penalty that asks for the sign
    np.testing.assert_array_equal(scores(logits, at, logit_bias={1: 6}, repetition_penalty=4.0)[1], 1)


def test_logit_bias_is_added_to_its_tokens():
    actual = scores([1.0, 2.0, 3.0, 4.0], logit_bias={3: -INF, 0: 1.5, 1: -1})
    np.testing.assert_array_equal(actual, [2.5, 1, 3, -INF])


def naive_ban(text, words, size):
    return {word[-1] for word in words if len(word) == 1 or text[-len(word) + 1 :] == word[:-1]} & set(range(size))


@CASES
@given(
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=5, max_size=8),
    st.integers(1, 16),
)
def test_bad_words_are_banned_where_the_text_precedes_them(prompt, continuation, words, length):
    """Three tokens only, and one of the words is where the text is."""
    written = prompt + continuation
    words = [*words[:-1], [*written[-length:], 1][-16:]]
    at = after(text(prompt), *continuation)
    banned = set(np.flatnonzero(scores([0.0] * 3, at, bad_words_ids=words) == -INF))
    assert banned == naive_ban(written, words, 3)


@CASES
@given(st.data())
def test_history_counts_the_tokens_of_a_text(data):
    tokens = st.integers(0, V - 1)
    prompts = [data.draw(st.lists(tokens, max_size=20)) for _ in range(2)]
    continuation = data.draw(st.lists(st.tuples(tokens, tokens), max_size=6))
    decay_B = np.float32([0.5, 1.0] * (ROWS // 2))
    at = text(*prompts, decay=decay_B)
    for token_B in continuation:
        at = add(at, np.array(token_B * (ROWS // 2), np.int32))
    for b in range(2):
        new = [token_B[b] for token_B in continuation]
        written = prompts[b] + new
        assert set(np.flatnonzero(np.asarray(at.seen_BV)[b])) == set(written)
        counts = [
            sum(float(decay_B[b]) ** (len(new) - 1 - i) for i in range(len(new)) if new[i] == v) for v in range(V)
        ]
        np.testing.assert_allclose(np.asarray(at.counts_BV)[b], counts, rtol=1e-6)
        assert np.asarray(at.recent_BR)[b].tolist() == ([-1] * 16 + written)[-16:]


def test_history_never_forgets_a_presence():
    at = after(text(decay=0.01), 1, *[2] * 60)
    assert (np.asarray(at.counts_BV)[0, :3] > 0).tolist() == [False, True, True]


def test_history_holds_what_its_sampler_reads():
    def leaves(**settings):
        at = history(2, V, [[1], [2]], sampler=sampler(**settings))
        later = jax.eval_shape(at.add, np.zeros(2, np.int32))
        assert jax.tree.structure(later) == jax.tree.structure(at)
        return {name for name, leaf in later._asdict().items() if leaf is not None}

    assert leaves(top_p=0.5, logit_bias={1: 1.0}) == set()
    assert leaves(repetition_penalty=1.5) == {"seen_BV"}
    assert leaves(presence_penalty=1.5) == leaves(frequency_penalty=1) == {"counts_BV", "decay_B"}
    assert leaves(temperature=0, bad_words_ids=[[1]]) == {"recent_BR"}
    assert all(leaf is not None for leaf in history(1, V, sampler=lambda *_: None))
    with pytest.raises(ValueError, match="presence_penalty needs the history's counts_BV, which is None"):
        sampler(presence_penalty=1)(np.zeros((1, V)), None, history(1, V, sampler=sampler()))
    with pytest.raises(ValueError, match=r"decay of penalties is 1\.5, expected 0 to 1"):
        history(1, V, decay=1.5)
