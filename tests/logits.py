"""Logits that are hard on samplers, and what is left of them. Everything is computed for `ROWS` rows of `V` tokens, so
that each kind of sampler is compiled once."""

import math

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from scipy import special

from rwkv_jax.generate import filters
from rwkv_jax.generate.sampling import history, sampler

V, ROWS, INF = 24, 8, math.inf
CASES = settings(max_examples=60, deadline=None, derandomize=True)

tied = st.lists(st.integers(-3, 3).map(float), min_size=V, max_size=V)
smooth = st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), min_size=V, max_size=V)
one_hot = st.integers(0, V - 1).map(lambda i: [50.0 * (j == i) for j in range(V)])
banned = st.lists(st.sampled_from([-INF, -0.0, 0.0, 1.0, 2.5]), min_size=V, max_size=V)
LOGITS = (tied | smooth | one_hot | banned | st.just([0.0] * V)).filter(lambda x: max(x) > -INF).map(np.float32)


def distribution(sampler, logits_BV, history):
    """Logits whose softmax a sampler of a temperature above 0 draws from."""
    return filters.truncated(filters.scores(logits_BV, history, sampler.keywords), sampler.keywords)


jitted_distribution = jax.jit(distribution)
_scores = jax.jit(lambda sampler, logits_BV, history: filters.scores(logits_BV, history, sampler.keywords))
add = jax.jit(lambda history, tokens_B: history.add(tokens_B))


def padded(logits, fill=-INF):
    """[ROWS, V]: the logits, [V] or [B, V], of which those of lacking tokens are `fill` and lacking rows zero."""
    logits_BV = np.atleast_2d(np.asarray(logits, np.float32))
    out = np.zeros((ROWS, max(V, logits_BV.shape[1])), np.float32)
    out[: len(logits_BV)] = fill
    out[: len(logits_BV), : logits_BV.shape[1]] = logits_BV
    return out


def text(*prompts, decay=1.0):
    """The history after prompts, for `ROWS` rows."""
    return history(ROWS, V, [*prompts] + [[]] * (ROWS - len(prompts)), decay)


def filtered(logits_V, history_=None, **options):
    """The distribution [V] that a sampler draws from, cut to the tokens that were given."""
    return np.asarray(jitted_distribution(sampler(**options), padded(logits_V), history_))[0][: len(logits_V)]


def scores(logits_V, history_=None, **options):
    """Before the offset that makes the largest 0."""
    return np.asarray(_scores(sampler(**options), padded(logits_V), history_))[0][: len(logits_V)]


def kept(logits_V, history_=None, **options):
    return np.isfinite(filtered(logits_V, history_, **options))


def probabilities(logits):
    return special.softmax(np.float64(logits))


ALL = {
    "temperature": 0.9,
    "top_k": 15,
    "top_p": 0.9,
    "min_p": 0.001,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {1: 0.5},
    "bad_words_ids": [[3], [2, 5]],
}
# Filters that remove nothing from a few likely tokens, with which those that do share a compiled function.
NEUTRAL = {"top_k": V, "top_p": 1 - 2**-24, "min_p": 1e-30, "typical_p": 1 - 2**-24}
