"""Draws and settings of samplers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logits import ALL, CASES, INF, LOGITS, NEUTRAL, ROWS, V, jitted_distribution, padded, probabilities, text
from scipy import stats

from rwkv_jax.generate import filters, sampling
from rwkv_jax.generate.sampling import history, sampler

MANY = 256  # rows in which one distribution is drawn from
FILTERS = NEUTRAL | {"top_p": 0.7, "min_p": 0.02}
SLOW = pytest.mark.slow


@functools.partial(jax.jit, static_argnums=2)
def _keys(seed, first, count):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), first), count)


_call = jax.jit(lambda sampler, logits_BV, key_B, history: sampler(logits_BV, key_B, history))


def draws(sampler_, logits, seed=0, history_=None, fold=0):
    """Of `ROWS` rows, or of one row many draws."""
    logits_BV = padded(logits) if np.ndim(logits) == 2 else np.tile(np.float32(logits), (MANY, 1))
    key_B = _keys(np.uint32(seed), np.uint32(fold), len(logits_BV))
    tokens_B = np.asarray(_call(sampler_, logits_BV, key_B, history_))
    return tokens_B[: len(logits)] if np.ndim(logits) == 2 else tokens_B


def assert_drawn_from(tokens, p_V):
    """Chi-square over the tokens that are expected 5 times, and the rest as one."""
    expected_V = len(tokens) * p_V
    observed_V = np.bincount(tokens, minlength=len(p_V))
    assert not observed_V[p_V == 0].any()
    often = expected_V >= 5
    observed = np.append(observed_V[often], observed_V[~often].sum())
    expected = np.append(expected_V[often], expected_V[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 1e-3


MANY_TOKENS = 3 * filters.LANES + 7


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (V, {}),
        (V, {"temperature": 0.5}),
        (V, {"temperature": 2.0, "top_k": 4, "top_p": 0.9, "min_p": 1e-9, "typical_p": 1 - 2**-24}),
        (MANY_TOKENS, {}),
        pytest.param(MANY_TOKENS, {"temperature": 0.5}, marks=SLOW),
        pytest.param(MANY_TOKENS, {"top_p": 0.6}, marks=SLOW),
        pytest.param(MANY_TOKENS, {"temperature": 2.0, "top_k": 4}, marks=SLOW),
    ],
)
def test_draws_follow_the_probabilities(size, options):
    logits_V = np.random.default_rng(3).normal(size=size).astype(np.float32)
    logits_V[::7] = -INF
    p_V = probabilities(logits_V / options.get("temperature", 1))
    order = np.argsort(-p_V)
    if "top_k" in options:
        p_V[order[4:]] = 0
    if "top_p" in options:
        p_V /= p_V.sum()
        p_V[order[np.cumsum(p_V[order]) - p_V[order] >= options["top_p"]]] = 0
    num_draws = 2048 if "typical_p" in options else 8192  # of which filters take most of the time
    tokens = np.concatenate([draws(sampler(**options), logits_V, fold=fold) for fold in range(num_draws // MANY)])
    assert_drawn_from(tokens, p_V / p_V.sum())


@settings(CASES, max_examples=50)
@given(LOGITS, st.integers(0, 2**31))
def test_draws_are_tokens_with_a_probability(logits_V, seed):
    tokens = draws(sampler(), logits_V, seed)
    assert np.exp(logits_V - logits_V.max())[tokens].all()


def test_inverse_never_chooses_a_place_without_probability():
    """Where the number drawn is 0, or where the running sum, which XLA adds up as a tree, grows by rounding alone."""
    rng = np.random.default_rng(0)
    p_RN = np.float32(rng.random((200, filters.LANES)) * (rng.random((200, filters.LANES)) < 0.5))
    p_RN[:, :3] = p_RN[:, -3:] = 0
    sum_RN = np.asarray(jax.jit(jnp.cumsum, static_argnums=1)(p_RN, 1))
    row_B, place_B = np.nonzero((p_RN == 0) & (np.diff(sum_RN, axis=1, prepend=0) > 0))
    assert len(row_B)  # or nothing is tested: take other numbers
    u_B = sum_RN[row_B, place_B - 1] / sum_RN[row_B].max(axis=1)
    row_B, u_B = (
        np.append(np.tile(row_B, 3), 0),
        [u_B, np.nextafter(u_B, np.float32(0)), np.nextafter(u_B, np.float32(2))],
    )
    u_B = np.minimum(np.append(np.concatenate(u_B), 0), 1 - 2**-24).astype(np.float32)
    chosen_B = np.asarray(jax.jit(sampling._inverse)(p_RN[row_B], u_B))
    assert (p_RN[row_B, chosen_B] > 0).all()


def test_sampler_takes_bfloat16_logits():
    logits_BV = np.array([[1.0, 3.0, 2.0]], jnp.bfloat16)
    assert np.asarray(_call(sampler(temperature=1e-3), logits_BV, _keys(0, 0, 1), None)).tolist() == [1]


@CASES
@given(LOGITS)
def test_greedy_takes_the_first_of_the_likeliest_tokens(logits_V):
    options = {"temperature": 0, "top_k": 3, "top_p": 0.1, "typical_p": 0.1, "min_p": 0.5}
    chosen = sampler(**options)
    assert chosen.keywords == {}
    assert draws(chosen, logits_V[None]).tolist() == [logits_V.argmax()]


def test_greedy_takes_the_best_score():
    """After biases and penalties."""
    options = {"temperature": 0, "repetition_penalty": 1.001, "logit_bias": {2: -1.0}}
    assert draws(sampler(**options), [[0, 1, 5, 4]], 0, text([3])).tolist() == [2]
    assert draws(sampler(**options | {"logit_bias": {2: -INF}}), [[0, 1, 5, 4]], 0, text([3])).tolist() == [3]
    assert draws(sampler(**options | {"repetition_penalty": 9.0}), [[0, 1, 0, 4]], 0, text([3])).tolist() == [1]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, FILTERS, *(pytest.param({name: 0.5}, marks=SLOW) for name in ("top_p", "typical_p"))],
)
def test_sampler_draws_minus_one_where_there_is_no_token_to_draw(options):
    """And leaves the others alone."""
    logits_BV = np.zeros((5, V), np.float32)
    logits_BV[0] = -INF
    logits_BV[1, 4] = math.nan
    logits_BV[2, 4] = INF
    logits_BV[3] = math.nan
    assert draws(sampler(**options), logits_BV)[:4].tolist() == [-1] * 4
    assert draws(sampler(**options), logits_BV)[4] == draws(sampler(**options), np.zeros((5, V)))[4] >= 0
    p_BV = np.asarray(jitted_distribution(sampler(**options), padded(logits_BV), None))
    assert np.isnan(p_BV).all(axis=-1).tolist() == [True] * 4 + [False] * (ROWS - 4)


def test_sampler_draws_minus_one_where_all_tokens_are_banned():
    everything = {token: -INF for token in range(V)}
    assert draws(sampler(logit_bias=everything), np.zeros((5, V))).tolist() == [-1] * 5


@settings(CASES, max_examples=50)
@given(
    LOGITS,
    LOGITS,
    st.sampled_from([{}, FILTERS, FILTERS | {"top_k": 3}, FILTERS | {"typical_p": 0.5, "top_p": 0.999}, ALL]),
)
def test_sampler_rows_are_independent_of_their_neighbours(first, second, options):
    """Also where its neighbour has ties, which take a step more, or nothing to draw."""
    row = np.random.default_rng(1).normal(size=V).astype(np.float32)
    chosen, key_B = sampler(**options), _keys(5, 0, ROWS)
    at, results = text([0, 2], [1, 2], [2, 2]) if options is ALL else None, []
    for neighbours in ((first, second), (second, np.full(V, math.nan, np.float32))):
        logits_BV = padded(np.stack([neighbours[0], row, neighbours[1]]))
        left_BV = np.asarray(jitted_distribution(chosen, logits_BV, at))
        results.append((np.asarray(_call(chosen, logits_BV, key_B, at))[1], left_BV[1]))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_draws_depend_on_the_key_alone():
    logits_V = np.random.default_rng(0).normal(size=V)
    assert draws(sampler(), logits_V, seed=1).tolist() == draws(sampler(), logits_V, seed=1).tolist()
    assert draws(sampler(), logits_V, seed=1).tolist() != draws(sampler(), logits_V, seed=2).tolist()
    assert len(set(draws(sampler(), np.zeros(V)).tolist())) > 10  # each row by its own key


# -------------------------------------------------------------------------------------------------- interface


def test_sampler_with_other_numbers_compiles_nothing():
    """Two samplers of the same settings are the same to `jax.jit`, whatever their numbers."""
    traces = []

    @jax.jit
    def step(sampler, x):
        traces.append(sampler)
        return x

    x = np.zeros(2, np.float32)
    for options in (
        ALL,
        {**ALL, "temperature": 1.0, "top_k": 3, "top_p": 0.1, "typical_p": 0.2, "min_p": 0.5},
        {**ALL, "repetition_penalty": 0.5, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {7: -INF}},
        {**ALL, "bad_words_ids": [[4, 5, 6], [1]]},
    ):
        step(sampler(**options), x)
    assert len(traces) == 1
    for count, options in enumerate(({}, {"temperature_last": True}, {"temperature": 0}, {"top_k": 1}), start=2):
        step(sampler(**options), x)
        step(sampler(**options), x)
        assert len(traces) == count
    step(sampler(logit_bias={1: 1.0, 2: 1.0, 3: 1.0}), x)
    step(sampler(logit_bias={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}), x)
    assert len(traces) == 6


OFF = {
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1.0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "bad_words_ids": [],
}


def test_sampler_leaves_out_settings_that_are_off():
    assert sampler(**OFF).keywords == sampler(**dict.fromkeys(OFF)).keywords == {"temperature": 1}
    for options in ({}, {"temperature": 0}, ALL):
        found = str(jax.make_jaxpr(sampler(**options))(np.zeros((1, V), np.float32), _keys(0, 0, 1), history(1, V)))
        assert " sort[" not in found and " top_k[" not in found
        assert (" while[" in found or " scan[" in found) == (options == ALL)


def test_sampler_names_settings_out_of_range():
    for names, values, expected in (
        ("temperature", (-1, 1e-9, INF, math.nan, None, "1", True), "0, or from 1e-6 to 1e6"),
        ("top_p", (0, -0.1, 1.1, math.nan, "0.5"), r"a number in \(0, 1\]"),
        ("typical_p", (0, 1.1, math.nan), r"a number in \(0, 1\]"),
        ("min_p", (-0.1, 1.1, math.nan), r"a number in \[0, 1\]"),
        ("top_k", (-1, 1.5, 2.0, "3"), "a whole number, 0 or more"),
        ("repetition_penalty", (0, -1, INF, math.nan), "a number from 1e-6 to 1e6"),
        ("presence_penalty", (INF, math.nan, "1"), "a number from -1e6 to 1e6"),
        ("frequency_penalty", (-INF,), "a number from -1e6 to 1e6"),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"^{names} is {value!r}, expected {expected}$"):
                sampler(**{names: value})


def test_sampler_names_lists_out_of_range():
    for options, message in (
        ({"logit_bias": {-1: 1.0}}, "an id of logit_bias is -1, expected a token's id"),
        ({"logit_bias": {"a": 1.0}}, "an id of logit_bias is 'a', expected a token's id"),
        ({"logit_bias": {1: INF}}, "logit_bias[1] is inf, expected -1e6 to 1e6, or -inf"),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids[1] is [], expected 1 to 16 ids of tokens"),
        ({"bad_words_ids": [[1] * 17]}, f"bad_words_ids[0] is {[1] * 17}, expected 1 to 16 ids of tokens"),
        ({"bad_words_ids": [[1, -2]]}, "bad_words_ids[0] is [1, -2], expected 1 to 16 ids of tokens"),
        ({"bad_words_ids": [7]}, "bad_words_ids[0] is 7, expected 1 to 16 ids of tokens"),
    ):
        with pytest.raises(ValueError) as error:
            sampler(**options)
        assert str(error.value) == message


def test_check_vocabulary_names_tokens_beyond_it():
    sampling.check_vocabulary(sampler(logit_bias={1: 1.0, 2: 1.0, 9: 1.0}, bad_words_ids=[[9, 9], [1], [2]]), 10)
    sampling.check_vocabulary(lambda *_: None, 10)
    with pytest.raises(ValueError, match="logit_bias names token 10, expected ids from 0 to 9"):
        sampling.check_vocabulary(sampler(logit_bias={1: 1.0, 10: 1.0}), 10)
    with pytest.raises(ValueError, match="bad_words_ids names token 11, expected ids from 0 to 9"):
        sampling.check_vocabulary(sampler(bad_words_ids=[[1, 2, 11, 3]]), 10)
