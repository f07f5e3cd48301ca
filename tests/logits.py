"""Logits that are hard on samplers, and what is left of them."""

import math

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from scipy import special

from rwkv_jax.generate.sampling import distribution, sampler

V, INF = 24, math.inf
CASES = settings(max_examples=60, deadline=None, derandomize=True)
jitted_distribution = jax.jit(distribution)

tied = st.lists(st.integers(-3, 3).map(float), min_size=V, max_size=V)
smooth = st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), min_size=V, max_size=V)
one_hot = st.integers(0, V - 1).map(lambda i: [50.0 * (j == i) for j in range(V)])
banned = st.lists(st.sampled_from([-INF, -0.0, 0.0, 1.0, 2.5]), min_size=V, max_size=V)
LOGITS = (tied | smooth | one_hot | banned | st.just([0.0] * V)).filter(lambda x: max(x) > -INF).map(np.float32)


def filtered(logits_V, history_=None, **options):
    """The distribution [V] that a sampler draws from."""
    return np.asarray(jitted_distribution(sampler(**options), logits_V[None], history_)[0])


def kept(logits_V, **options):
    return np.isfinite(filtered(logits_V, **options))


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
