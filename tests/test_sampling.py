"""Draws and settings of samplers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from logits import ALL, CASES, INF, LOGITS, V, jitted_distribution, kept, probabilities
from scipy import stats

from rwkv_jax.generate import filters, sampling
from rwkv_jax.generate.sampling import distribution, history, sampler

_call = jax.jit(lambda sampler, logits_BV, key_B, history: sampler(logits_BV, key_B, history))


def draws(sampler_, logits_BV, seed=0, history_=None):
    logits_BV = np.asarray(logits_BV, np.float32)
    return np.asarray(_call(sampler_, logits_BV, jax.random.split(jax.random.key(seed), len(logits_BV)), history_))


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


@pytest.mark.parametrize("size", [5, 3 * filters.LANES + 7])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 4}])
def test_draws_follow_the_probabilities(size, options):
    logits_V = np.random.default_rng(3).normal(size=size).astype(np.float32)
    logits_V[::7] = -INF
    p_V = probabilities(logits_V / options.get("temperature", 1))
    order = np.argsort(-p_V)
    if "top_k" in options:
        p_V[order[4:]] = 0
    if "top_p" in options:
        p_V[order[np.cumsum(p_V[order]) - p_V[order] >= 0.6]] = 0
    tokens = draws(sampler(**options), np.tile(logits_V, (8192, 1)))
    assert_drawn_from(tokens, p_V / p_V.sum())


@settings(CASES, max_examples=50)
@given(LOGITS, st.integers(0, 2**31))
def test_no_token_without_probability(logits_V, seed):
    tokens = draws(sampler(), np.tile(logits_V, (256, 1)), seed)
    assert np.exp(logits_V - logits_V.max())[tokens].all()


def test_a_place_is_never_one_without_probability():
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
    chosen_B = jax.jit(sampling._inverse)(p_RN[row_B], u_B)
    assert (p_RN[row_B, chosen_B] > 0).all()


def test_bfloat16_logits():
    logits_BV = jnp.array([[1.0, 3.0, 2.0]], jnp.bfloat16)
    assert draws(sampler(top_k=1), logits_BV).tolist() == [1]


@CASES
@given(LOGITS)
def test_greedy(logits_V):
    options = {"temperature": 0, "top_k": 3, "top_p": 0.1, "typical_p": 0.1, "min_p": 0.5}
    assert draws(sampler(**options), logits_V[None]).tolist() == [logits_V.argmax()]
    assert np.flatnonzero(kept(logits_V, temperature=0)).tolist() == [logits_V.argmax()]
    assert sampler(**options).keywords == {}


def test_greedy_takes_the_best_score():
    at = history(1, 4, [[3]])
    assert draws(sampler(temperature=0, logit_bias={2: -INF}), [[0, 1, 5, 4]]).tolist() == [3]
    assert draws(sampler(temperature=0, repetition_penalty=9.0), [[0, 1, 0, 4]], 0, at).tolist() == [1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}])
def test_a_row_with_no_token_to_draw(options):
    logits_BV = np.zeros((5, 6), np.float32)
    logits_BV[0] = -INF
    logits_BV[1, 4] = math.nan
    logits_BV[2, 4] = INF
    logits_BV[3] = math.nan
    assert draws(sampler(**options), logits_BV)[:4].tolist() == [-1] * 4
    assert draws(sampler(**options), logits_BV)[4] == draws(sampler(**options), np.zeros((5, 6)))[4] >= 0
    p_BV = jitted_distribution(sampler(**options), logits_BV, None)
    assert np.isnan(p_BV).all(axis=-1).tolist() == [True] * 4 + [False]
    everything = {token: -INF for token in range(6)}
    assert draws(sampler(**options, logit_bias=everything), logits_BV).tolist() == [-1] * 5


@settings(CASES, max_examples=50)
@given(LOGITS, LOGITS, st.sampled_from([{}, {"top_p": 0.7}, {"top_k": 3}, {"typical_p": 0.5}, ALL]))
def test_a_row_is_its_own(first, second, options):
    """Also where its neighbour has ties, which take a step more, or nothing to draw."""
    rng = np.random.default_rng(1)
    row = rng.normal(size=V).astype(np.float32)
    chosen, key_B = sampler(**options), jax.random.split(jax.random.key(5), 3)
    results = []
    for neighbours in ((first, second), (second, np.full(V, math.nan, np.float32))):
        logits_BV = np.stack([neighbours[0], row, neighbours[1]])
        at = history(3, V, [[0, 2], [1, 2], [2, 2]])
        results.append((_call(chosen, logits_BV, key_B, at)[1], jitted_distribution(chosen, logits_BV, at)[1]))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_key_is_a_draw():
    logits_BV = np.random.default_rng(0).normal(size=(64, V))
    assert draws(sampler(), logits_BV, seed=1).tolist() == draws(sampler(), logits_BV, seed=1).tolist()
    assert draws(sampler(), logits_BV, seed=1).tolist() != draws(sampler(), logits_BV, seed=2).tolist()
    row_B = draws(sampler(), np.zeros((64, V)))
    assert len(set(row_B.tolist())) > 10  # each row by its own key


# -------------------------------------------------------------------------------------------------- interface


def test_numbers_compile_nothing():
    traces = []

    @jax.jit
    def step(sampler, logits_BV, key_B, history):
        traces.append(sampler)
        return sampler(logits_BV, key_B, history)

    arrays = jnp.zeros((2, V)), jax.random.split(jax.random.key(0), 2), history(2, V)
    for options in (
        ALL,
        {**ALL, "temperature": 1.0, "top_k": 3, "top_p": 0.1, "typical_p": 0.2, "min_p": 0.5},
        {**ALL, "repetition_penalty": 0.5, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {7: -INF}},
        {**ALL, "bad_words_ids": [[4, 5, 6], [1]]},
    ):
        step(sampler(**options), *arrays)
    assert len(traces) == 1
    for count, options in enumerate(({}, {"temperature_last": True}, {"temperature": 0}, {"top_k": 1}), start=2):
        step(sampler(**options), *arrays)
        step(sampler(**options), *arrays)
        assert len(traces) == count
    step(sampler(logit_bias={1: 1.0, 2: 1.0, 3: 1.0}), *arrays)
    step(sampler(logit_bias={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}), *arrays)
    assert len(traces) == 6

    def mine(logits_BV, key_B, history):
        return logits_BV.argmax(axis=-1)

    assert step(Partial(mine), *arrays).tolist() == [0, 0]


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


def test_what_is_off_is_not_there():
    assert sampler(**OFF).keywords == sampler(**dict.fromkeys(OFF)).keywords == {"temperature": 1}
    for options in ({}, {"temperature": 0}, ALL):
        text = str(
            jax.make_jaxpr(sampler(**options))(
                jnp.zeros((1, V)), jax.random.split(jax.random.key(0), 1), history(1, V)
            )
        )
        assert " sort[" not in text and " top_k[" not in text
        assert (" while[" in text or " scan[" in text) == (options == ALL)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("temperature", value, "0, or from 1e-6 to 1e6") for value in (-1, 1e-9, INF, math.nan, None, "1", True)),
        *(("top_p", value, r"a number in \(0, 1\]") for value in (0, -0.1, 1.1, math.nan, "0.5")),
        *(("typical_p", value, r"a number in \(0, 1\]") for value in (0, 1.1, math.nan)),
        *(("min_p", value, r"a number in \[0, 1\]") for value in (-0.1, 1.1, math.nan)),
        *(("top_k", value, "a whole number, 0 or more") for value in (-1, 1.5, 2.0, "3")),
        *(("repetition_penalty", value, "a number from 1e-6 to 1e6") for value in (0, -1, INF, math.nan)),
        *(("presence_penalty", value, "a number from -1e6 to 1e6") for value in (INF, math.nan, "1")),
        ("frequency_penalty", -INF, "a number from -1e6 to 1e6"),
    ],
)
def test_settings_out_of_range(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected {expected}$"):
        sampler(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {-1: 1.0}}, "an id of logit_bias is -1, expected a token's id"),
        ({"logit_bias": {"a": 1.0}}, "an id of logit_bias is 'a', expected a token's id"),
        ({"logit_bias": {1: INF}}, "logit_bias[1] is inf, expected -1e6 to 1e6, or -inf"),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids[1] is [], expected 1 to 16 ids of tokens"),
        ({"bad_words_ids": [[1] * 17]}, f"bad_words_ids[0] is {[1] * 17}, expected 1 to 16 ids of tokens"),
        ({"bad_words_ids": [[1, -2]]}, "bad_words_ids[0] is [1, -2], expected 1 to 16 ids of tokens"),
        ({"bad_words_ids": [7]}, "bad_words_ids[0] is 7, expected 1 to 16 ids of tokens"),
    ],
)
def test_lists_out_of_range(options, message):
    with pytest.raises(ValueError) as error:
        sampler(**options)
    assert str(error.value) == message


def test_tokens_that_the_model_does_not_have():
    sampling.check_vocabulary(sampler(logit_bias={1: 1.0, 2: 1.0, 9: 1.0}, bad_words_ids=[[9, 9], [1], [2]]), 10)
    sampling.check_vocabulary(lambda *_: None, 10)
    with pytest.raises(ValueError, match="logit_bias names token 10, expected ids from 0 to 9"):
        sampling.check_vocabulary(sampler(logit_bias={1: 1.0, 10: 1.0}), 10)
    with pytest.raises(ValueError, match="bad_words_ids names token 11, expected ids from 0 to 9"):
        sampling.check_vocabulary(sampler(bad_words_ids=[[1, 2, 11, 3]]), 10)


def test_a_function_of_ones_own_has_no_knownjitted_distribution():
    with pytest.raises(ValueError, match="is not known, expected what sampling"):
        distribution(Partial(max), jnp.zeros((1, V)))
