"""Official state dicts become our parameters and back, by name, layout and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from weights import DECAYS, D, F, L, V, assert_same_tensors, official, one_line, tiny

from rwkv_jax import interop, models


@pytest.mark.parametrize("dtype, num_layers", [("float32", 11), ("float16", L), ("bfloat16", L)])
def test_official_weights_survive_the_round_trip_bit_exactly(dtype, num_layers):
    """11 layers, whose numbers as text sort otherwise."""
    tensors = official(jnp.dtype(dtype), num_layers)
    expected = {name: x.astype(np.float32) if name.endswith(DECAYS) else x for name, x in tensors.items()}
    for scan in (True, False):
        model, params = interop.from_official(tensors, scan=scan)
        assert (model.vocab_size, model.num_layers, model.dim, model.hidden_dim) == (V, num_layers, D, F)
        assert (model.scan, model.param_dtype) == (scan, dtype)
        assert model.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
        assert_same_tensors(interop.to_official(params), expected)


def test_parameter_shapes_are_those_of_init():
    for scan in (True, False):
        model, _ = tiny(scan=scan)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))["params"]
        assert models.parameter_shapes(model) == params
        models.parameter_shapes(model).clear()  # a caller's tree is its own
        assert models.parameter_shapes(model) == params


def test_official_matrices_are_transposed_and_layers_stay_in_order():
    tensors = official()
    _, params = interop.from_official(tensors)
    for i in range(L):
        kernel = params["blocks"]["ffn"]["key"]["kernel"]
        np.testing.assert_array_equal(np.asarray(kernel)[i], tensors[f"blocks.{i}.ffn.key.weight"].T)
        mix = params["blocks"]["att"]["time_mix_k"]
        np.testing.assert_array_equal(np.asarray(mix)[i], tensors[f"blocks.{i}.att.time_mix_k"][0, 0])
    np.testing.assert_array_equal(params["ln0"]["scale"], tensors["blocks.0.ln0.weight"])
    np.testing.assert_array_equal(params["emb"]["embedding"], tensors["emb.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["head.weight"].T)


def test_official_dtype_casts_everything_but_the_decays():
    model, params = interop.from_official(official(), dtype="bfloat16")
    assert (model.dtype, model.param_dtype) == ("bfloat16", "bfloat16")
    for path, x in flatten_dict(params).items():
        assert x.dtype == ("float32" if path[-1] in DECAYS else "bfloat16"), path
    with one_line("dtype is 'int8', expected 'float32'"):
        interop.from_official(official(), dtype="int8")


def without(name):
    return {key: x for key, x in official().items() if key != name}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (without("blocks.1.att.key.weight"), r"key 'blocks.1.att.key.weight' is missing"),
        (without("emb.weight"), r"no RWKV-4 weights: 'emb.weight' is not among the \d+ keys \['head.weight'"),
        (official() | {"head_q.weight": np.zeros((D, D))}, r"unknown key 'head_q.weight'"),
        (official() | {"blocks.7.ln1.bias": np.zeros(D)}, rf"key 'blocks.{L}.att.key.weight' is missing"),
        (
            official() | {"blocks.0.att.time_mix_v": np.zeros(D)},
            r"'blocks.0.att.time_mix_v' has shape \(8,\), expected \(1, 1, 8\)",
        ),
        (official() | {"emb.weight": np.zeros(D)}, r"'emb.weight' has shape \(8,\), expected a matrix"),
        (official() | {"ln_out.bias": np.zeros(D, np.int64)}, r"'ln_out.bias' has dtype int64, expected floating poi"),
        (official() | {"blocks.0.att.ln_x.weight": np.zeros(D)}, r"RWKV-5 weights .*only RWKV-4 is supported"),
        (
            official() | {"blocks.0.att.time_maa_x": np.zeros(D), "blocks.0.att.ln_x.bias": np.zeros(D)},
            r"RWKV-6 weights \(they have 'blocks.0.att.time_maa_x'\)",
        ),
        (
            official() | {"blocks.0.att.ln_x.bias": np.zeros(D), "blocks.0.att.r_k": np.zeros((1, D))},
            r"RWKV-7 weights \(they have 'blocks.0.att.r_k'\)",
        ),
    ],
)
def test_official_state_dict_that_does_not_fit_is_named(tensors, message):
    with one_line(message):
        interop.from_official(tensors)
