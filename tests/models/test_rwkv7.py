"""The ablation switch of RWKV-7, and its keys of length 1."""

import jax
import numpy as np
from judge import error_ratio
from small import forward, made, make, tokens

from rwkv_jax.models.rwkv7 import unit


def test_removal_multiplies_what_the_key_removes():
    """Where k_a and the low-rank map of a are 0, a is the sigmoid of a0 alone and enters nothing but the removal."""
    _, params = made("rwkv7")
    ids = tokens(2, 8)

    def logits(removal, rate):
        given = {"k_a": 0, "a1": 0, "a0": np.log(rate / (1 - rate))}
        put = lambda path, x: np.full_like(x, given[path[-1].key]) if path[-1].key in given else x
        return forward(make("rwkv7", removal=removal), jax.tree_util.tree_map_with_path(put, params), ids)[0]

    assert error_ratio(logits(2.0, 0.3), logits(1.0, 0.6)) < 1e-6
    assert error_ratio(logits(2.0, 0.3), logits(1.0, 0.3)) > 1e-3


def test_unit_has_length_1_and_a_finite_gradient_where_a_key_is_zero():
    x = np.random.default_rng(0).standard_normal((1, 1, 3, 4), np.float32)
    x[0, 0, 0] = 0
    found, gradient = jax.device_get(jax.jit(lambda x: (unit(x), jax.grad(lambda x: unit(x).sum())(x)))(x))
    np.testing.assert_allclose(np.linalg.norm(found[0, 0], axis=-1), [0, 1, 1], rtol=1e-6)
    assert np.isfinite(gradient).all()
