"""Low-rank adapters: no effect at first, and equal results once merged into the weights."""

import functools

import jax
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict, unflatten_dict

from rwkv_jax.models import lora
from rwkv_jax.train.methods import Method

RANK, ALPHA = 2, 6.0
METHOD = Method("lora", RANK, ALPHA, "key|value|gate|(q|k|v|out|up|down)/kernel|head")
SLOWLY = lambda *kinds: [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def _with_nonzero_b(adapters):
    """Adapters with an effect: B starts at zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), adapters)


def _merged(params, adapters):
    """W + (alpha / rank) A B, in float64."""
    flat, pairs = flatten_dict(params), flatten_dict(jax.tree.map(lambda x: np.asarray(x, np.float64), adapters))
    for path in pairs:
        if path[-1] == "lora_b":
            kernel, a = (*path[:-1], "kernel"), pairs[*path[:-1], "lora_a"]
            flat[kernel] = flat[kernel] + ALPHA / RANK * (a @ pairs[path])
    return unflatten_dict(flat)


@pytest.mark.parametrize("kind", ["rwkv4", *SLOWLY("hybrid", "rwkv5", "rwkv6", "rwkv7")])
def test_lora_adapters_have_no_effect_at_first_and_merge_into_the_weights(kind):
    model, params = small.made(kind)
    tokens_BT = small.tokens(2, 8)
    plain_BTV, _ = small.forward(model, params, tokens_BT)
    fresh, frozen = jax.jit(functools.partial(METHOD.split, model))(params, jax.random.key(0))
    joined = lambda adapters: small.forward(model, METHOD.bind(model, adapters, frozen, 2)[0], tokens_BT)[0]
    # bit-equal within one program; XLA may round the plain model's program differently, and does for the hybrid
    np.testing.assert_array_equal(joined(fresh), joined(jax.tree.map(np.zeros_like, fresh)))
    np.testing.assert_allclose(joined(fresh), plain_BTV, rtol=1e-5, atol=1e-5)
    if kind == "rwkv4":
        np.testing.assert_array_equal(joined(fresh), plain_BTV)

    adapters = _with_nonzero_b(fresh)
    joined_BTV = joined(adapters)
    merged = lora.merge(jax.device_put(params), adapters, ALPHA)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), merged, _merged(params, adapters)
    )
    np.testing.assert_allclose(joined_BTV, small.forward(model, merged, tokens_BT)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(joined_BTV - plain_BTV).max() > 0.1


def test_lora_init_draws_a_for_each_kernel_within_its_bound():
    _, params = small.made("rwkv4", num_layers=1, dim=64)
    adapters = flatten_dict(lora.init(jax.random.key(0), params, 8, "/(att|ffn)/"))
    drawn = {path: np.asarray(x) for path, x in adapters.items() if path[-1] == "lora_a"}
    for path, a in drawn.items():
        bound = a.shape[-2] ** -0.5
        assert 0.95 * bound < np.abs(a).max() <= bound, path
    assert len({a.ravel()[0] for a in drawn.values()}) == len(drawn) == 7
    assert not any(x.any() for path, x in adapters.items() if path[-1] == "lora_b")


def test_lora_merge_refuses_a_sum_beyond_the_range_of_the_weights():
    params = {"att": {"key": {"kernel": jax.numpy.full((4, 3), 6e4, "float16")}}}
    adapters = {"att": {"key": {"lora_a": np.ones((4, 1), np.float32), "lora_b": np.full((1, 3), 3e3, np.float32)}}}
    assert np.isfinite(lora.merge(params, adapters, 1.0)["att"]["key"]["kernel"]).all()
    with pytest.raises(ValueError, match=r"^att/key with its adapters holds 66000, beyond the range of float16$"):
        lora.merge(params, adapters, 2.0)
