"""Draws and settings of samplers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from rwkv_jax.generate import filters, sampling
from rwkv_jax.generate.sampling import history, sampler

V, ROWS, INF = 24, 256, math.inf
FILTERS = {"top_k": 20, "top_p": 0.7, "min_p": 0.02, "typical_p": 0.9}
ALL = FILTERS | {
    "temperature": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {1: 0.5},
    "bad_words_ids": [[3], [2, 5]],
}


@functools.partial(jax.jit, static_argnums=2)
def _keys(seed, first, count):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), first), count)


_call = jax.jit(lambda sampler, logits_BV, key_B, history: sampler(logits_BV, key_B, history))


def draws(sampler_, logits, seed=0, history_=None, fold=0):
    """A token for each row of logits [B, V], or `ROWS` tokens for logits [V]."""
    logits_BV = np.float32(logits) if np.ndim(logits) == 2 else np.tile(np.float32(logits), (ROWS, 1))
    key_B = _keys(np.uint32(seed), np.uint32(fold), len(logits_BV))
    return np.asarray(_call(sampler_, logits_BV, key_B, history_))


def assert_drawn_from(tokens, p_V):
    """Check by chi-square over the tokens that are expected at least 5 times, and all others as one."""
    expected_V = len(tokens) * p_V
    observed_V = np.bincount(tokens, minlength=len(p_V))
    assert not observed_V[p_V == 0].any()
    often = expected_V >= 5
    observed = np.append(observed_V[often], observed_V[~often].sum())
    expected = np.append(expected_V[often], expected_V[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "settings"), [(V, {"temperature": 2.0, "top_k": 4}), (3 * filters.LANES + 7, {"temperature": 0.5})]
)
def test_draw_follows_the_probabilities(size, settings):
    logits_V = np.random.default_rng(3).normal(size=size).astype(np.float32)
    logits_V[::7] = -INF
    p_V = special.softmax(np.float64(logits_V) / settings["temperature"])
    p_V[np.argsort(-p_V)[settings.get("top_k", size) :]] = 0
    tokens = np.concatenate([draws(sampler(**settings), logits_V, fold=fold) for fold in range(32)])
    assert_drawn_from(tokens, p_V / p_V.sum())


def test_inverse_never_chooses_an_index_without_probability():
    """Covers a drawn number of 0, and a running sum, which XLA computes as a tree, that grows by rounding alone."""
    rng = np.random.default_rng(0)
    p_RN = np.float32(rng.random((200, filters.LANES)) * (rng.random((200, filters.LANES)) < 0.5))
    p_RN[:, :3] = p_RN[:, -3:] = 0
    sum_RN = np.asarray(jax.jit(jnp.cumsum, static_argnums=1)(p_RN, 1))
    row_B, place_B = np.nonzero((p_RN == 0) & (np.diff(sum_RN, axis=1, prepend=0) > 0))
    assert len(row_B)  # if it fails, the test is vacuous: choose other numbers
    u_B = sum_RN[row_B, place_B - 1] / sum_RN[row_B].max(axis=1)
    around_B = np.concatenate([u_B, np.nextafter(u_B, np.float32(0)), np.nextafter(u_B, np.float32(2)), [0]])
    row_B, u_B = np.append(np.tile(row_B, 3), 0), np.float32(np.minimum(around_B, 1 - 2**-24))
    chosen_B = np.asarray(jax.jit(sampling._inverse)(p_RN[row_B], u_B))
    assert (p_RN[row_B, chosen_B] > 0).all()


def test_sampler_at_temperature_0_takes_the_first_of_the_best_scores():
    """Biases and penalties apply; filters of the distribution have no effect."""
    greedy = functools.partial(sampler, temperature=0)
    assert greedy(**FILTERS).keywords == {}
    assert draws(greedy(), [[0, 5, 4, 5], [7, 7, 7, 7]]).tolist() == [1, 0]
    at, logits = history([[3]], 4), [[0, 1, 5, 4]]
    assert draws(greedy(repetition_penalty=1.001, logit_bias={2: -1.5}), logits, 0, at).tolist() == [3]
    assert draws(greedy(repetition_penalty=9.0, logit_bias={2: -INF}), logits, 0, at).tolist() == [1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, ALL])
def test_sampler_rows_are_independent_and_draw_minus_one_without_a_token(settings):
    """The first row keeps its token beside rows with ties, which take one more step, and rows without a token."""
    chosen, at = sampler(**settings), history([[0, 2]] * 5, V) if settings is ALL else None
    logits_BV = np.random.default_rng(1).normal(size=(5, V))
    smooth = draws(chosen, logits_BV, 5, at)
    logits_BV[1:] = 0
    tied = draws(chosen, logits_BV, 5, at)
    logits_BV[1] = -INF
    logits_BV[2, 4] = INF
    logits_BV[3, 4] = math.nan
    logits_BV[4] = math.nan
    assert draws(chosen, logits_BV, 5, at).tolist() == [smooth[0], -1, -1, -1, -1]
    assert smooth[0] == tied[0] and min(*smooth, *tied) >= 0


def test_draw_depends_on_the_key_alone():
    logits_V = np.random.default_rng(0).normal(size=V)
    assert draws(sampler(), logits_V, seed=1).tolist() == draws(sampler(), logits_V, seed=1).tolist()
    assert draws(sampler(), logits_V, seed=1).tolist() != draws(sampler(), logits_V, seed=2).tolist()
    assert len(set(draws(sampler(), np.zeros(V)).tolist())) > 10  # each row has its own key


# -------------------------------------------------------------------------------------------------- interface


def test_sampler_with_other_numbers_compiles_no_program():
    """To `jax.jit` two samplers with the same settings are equal, with any numbers."""
    structure = lambda **settings: jax.tree.structure(sampler(**settings))
    shapes = lambda **settings: [np.shape(leaf) for leaf in jax.tree.leaves(sampler(**settings))]
    others = {"temperature": 1.0, "top_k": 3, "top_p": 0.1, "frequency_penalty": -1, "logit_bias": {7: -INF}}
    assert structure(**ALL) == structure(**ALL | others) and shapes(**ALL) == shapes(**ALL | others)
    assert len({structure(), structure(temperature_last=True), structure(temperature=0), structure(top_k=1)}) == 4


def test_sampler_leaves_out_settings_that_are_off():
    off = {"top_p": 1, "top_k": 0, "min_p": 0, "typical_p": 1.0, "repetition_penalty": 1, "presence_penalty": 0}
    off |= {"frequency_penalty": 0.0, "logit_bias": {}, "bad_words_ids": []}
    assert sampler(**off).keywords == sampler(**dict.fromkeys(off)).keywords == {"temperature": 1}
    for settings in ({}, {"temperature": 0}, ALL):
        found = str(
            jax.make_jaxpr(sampler(**settings))(np.zeros((1, V), np.float32), _keys(0, 0, 1), history([[]], V))
        )
        assert " sort[" not in found and " top_k[" not in found
        assert (" while[" in found or " scan[" in found) == (settings == ALL)


def test_sampler_names_settings_out_of_range():
    for name, values, expected in (
        ("temperature", (-1, 1e-9, math.nan, None, "1", True), "temperature is {}, expected 0, or from 1e-6 to 1e6"),
        ("top_p", (0, 1.1, math.nan), "top_p is {}, expected a number in (0, 1]"),
        ("typical_p", (0, 1.1), "typical_p is {}, expected a number in (0, 1]"),
        ("min_p", (-0.1, 1.1), "min_p is {}, expected a number in [0, 1]"),
        ("top_k", (-1, 2.0), "top_k is {}, expected a whole number, 0 or more"),
        ("repetition_penalty", (0, INF), "repetition_penalty is {}, expected a number from 1e-6 to 1e6"),
        ("presence_penalty", (INF,), "presence_penalty is {}, expected a number from -1e6 to 1e6"),
        ("frequency_penalty", (-INF,), "frequency_penalty is {}, expected a number from -1e6 to 1e6"),
        ("logit_bias", ({-1: 1.0},), "an id of logit_bias is -1, expected a token's id"),
        ("logit_bias", ({1: INF},), "logit_bias[1] is inf, expected -1e6 to 1e6, or -inf"),
        ("bad_words_ids", ([[1], []],), "bad_words_ids[1] is [], expected 1 to 16 ids of tokens"),
        ("bad_words_ids", ([[1] * 17],), f"bad_words_ids[0] is {[1] * 17}, expected 1 to 16 ids of tokens"),
        ("bad_words_ids", ([[1, -2]],), "bad_words_ids[0] is [1, -2], expected 1 to 16 ids of tokens"),
    ):
        for value in values:
            with pytest.raises(ValueError) as error:
                sampler(**{name: value})
            assert str(error.value) == expected.format(repr(value))


def test_check_vocabulary_names_tokens_beyond_it():
    sampling.check_vocabulary(sampler(logit_bias={1: 1.0, 9: 1.0}, bad_words_ids=[[9, 9], [1]]), 10)
    sampling.check_vocabulary(lambda *_: None, 10)
    with pytest.raises(ValueError, match="logit_bias names token 10, expected ids from 0 to 9"):
        sampling.check_vocabulary(sampler(logit_bias={1: 1.0, 10: 1.0}), 10)
    with pytest.raises(ValueError, match="bad_words_ids names token 11, expected ids from 0 to 9"):
        sampling.check_vocabulary(sampler(bad_words_ids=[[1, 2, 11, 3]]), 10)
