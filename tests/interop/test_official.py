"""Official state dicts to our parameters and back: names, layouts and dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from small import forward
from weights import DECAYS, D, F, L, V, assert_same_tensors, official, one_line, tiny, trained

from rwkv_jax import interop, models


@pytest.mark.parametrize("dtype, num_layers", [("float32", 11), ("float16", L), ("bfloat16", L)])
def test_from_official_and_to_official_are_inverse_bit_exactly(dtype, num_layers):
    """11 layers, because their numbers sort differently as text."""
    tensors = official(jnp.dtype(dtype), num_layers)
    expected = {name: x.astype(np.float32) if name.endswith(DECAYS) else x for name, x in tensors.items()}
    for scan in (True, False):
        model, params = interop.from_official(tensors, scan=scan)
        assert (model.vocab_size, model.num_layers, model.dim, model.hidden_dim) == (V, num_layers, D, F)
        assert (model.scan, model.param_dtype) == (scan, dtype)
        assert model.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
        assert_same_tensors(interop.to_official(params), expected)


def test_parameter_shapes_equal_those_of_init():
    for scan in (True, False):
        model, _ = tiny(scan=scan)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))["params"]
        assert models.parameter_shapes(model) == params
        models.parameter_shapes(model).clear()  # callers get a copy
        assert models.parameter_shapes(model) == params


def test_from_official_transposes_matrices_and_keeps_the_order_of_layers():
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


def test_from_official_casts_everything_but_the_decays():
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
        (without("emb.weight"), r"not RWKV weights: 'emb.weight' is not among the \d+ keys \['head.weight'"),
        (official() | {"head_q.weight": np.zeros((D, D))}, r"unknown key 'head_q.weight'"),
        (official() | {"blocks.7.ln1.bias": np.zeros(D)}, rf"key 'blocks.{L}.att.key.weight' is missing"),
        (
            official() | {"blocks.0.att.time_mix_v": np.zeros(D)},
            r"'blocks.0.att.time_mix_v' has shape \(8,\), expected \(1, 1, 8\)",
        ),
        (official() | {"emb.weight": np.zeros(D)}, r"'emb.weight' has shape \(8,\), expected a matrix"),
        (official() | {"ln_out.bias": np.zeros(D, np.int64)}, r"'ln_out.bias' has dtype int64, expected floating poi"),
        (official() | {"blocks.0.att.ln_x.weight": np.zeros(D)}, r"RWKV-5.0 weights .* 5.2, 6 and 7 are supported"),
        (
            official() | {f"blocks.0.att.{name}.weight": np.zeros(D) for name in ("ln_x", "gate")},
            r"RWKV-5.1 weights \(one decay a head\)",
        ),
        *(
            (official() | {name: np.zeros(D)}, rf"^{version} weights \(they have '{name}'\); RWKV-4, 5.2, 6 and 7 are")
            for name, version in {
                "blocks.0.ffn.s_emb.weight": "RWKV-7 with deep embeddings",
                "emb_x.weight": "RWKV-7 with deep embeddings",
                "blocks.0.qkv.q.weight": "RWKV-7 with attention",
                "rosa.weight": "RWKV-8",
                "blocks.0.att.time_maa_rkvw_w1": "RWKV-6b",
                "blocks.0.att.gate_w1": "RWKV-6a",
            }.items()
        ),
        (official() | {"blocks.0.att.r_k": np.zeros((1, D))}, "key 'blocks.0.att.a1' is missing"),
    ],
)
def test_from_official_names_what_does_not_fit_in_a_state_dict(tensors, message):
    with one_line(message):
        interop.from_official(tensors)


@pytest.mark.parametrize(
    "kind, names",
    [
        ("rwkv5", ("ln_x.weight", "gate.weight", "time_decay", "time_faaaa")),
        ("rwkv6", ("ln_x.weight", "time_maa_x", "time_maa_w1", "time_decay_w1", "time_faaaa")),
        ("rwkv7", ("ln_x.weight", "r_k", "x_r", "w1", "a1", "g1")),
    ],
)
def test_from_official_names_a_missing_tensor_in_the_right_version(kind, names):
    tensors = interop.to_official(tiny(kind=kind)[1])
    for name in (f"blocks.0.att.{name}" for name in names):
        with one_line(f"key '{name}' is missing"):
            interop.from_official({key: x for key, x in tensors.items() if key != name})


# Final tensors of the released trainers: 3 layers with 2 heads of 32 channels.
TRAINED = {"rwkv5": None, "rwkv6": (32, 64), "rwkv7": (32, 32, 32, 32)}


@pytest.mark.parametrize("kind", TRAINED)
def test_from_official_and_to_official_of_later_versions_are_inverse(kind):
    tensors, _ = trained(kind)
    for dtype in (np.float32, jnp.bfloat16):
        narrow = {name: x.astype(dtype) for name, x in tensors.items()}
        model, params = interop.from_official({f"_forward_module.{name}": x for name, x in narrow.items()})
        assert (model.layers, model.num_layers, model.head_size) == ((kind,), 3, 32)
        assert model.low_ranks == TRAINED[kind]
        back = interop.to_official(params)
        # the first layer of RWKV-7 has no value residual, but released files hold its matrices
        assert narrow.keys() - back.keys() == {n for n in narrow if re.match(r"blocks\.0\.att\.v[012]$", n)}
        wide = ("w0", "time_faaaa", "time_decay")
        expected = {name: x.astype(np.float32) if name.endswith(wide) else x for name, x in narrow.items()}
        assert_same_tensors(back, {name: expected[name] for name in back})


@pytest.mark.parametrize("kind, telling", [("rwkv5", "gate.weight"), ("rwkv6", "att.time_maa")])
def test_to_official_orders_names_so_that_the_rwkv_package_detects_versions(kind, telling):
    """The package miscounts the heads of RWKV-5 and 6 if a decay precedes the name that identifies the version."""
    _, params = interop.from_official(trained(kind)[0])
    backwards = unflatten_dict(dict(reversed(flatten_dict(params).items())))
    for tree in (params, backwards):
        names = list(interop.to_official(tree))
        assert max(names.index(n) for n in names if telling in n) < min(names.index(n) for n in names if "decay" in n)


@pytest.mark.parametrize("kind", TRAINED)
def test_from_official_of_later_versions_has_the_released_logits_and_state(kind):
    """Compares logits with the trainer's model in float64, and the state with the `rwkv` package in float32."""
    tensors, arrays = trained(kind)
    model, params = interop.from_official(tensors)
    logits, state = forward(model.clone(matmul_precision="highest"), params, np.int32(arrays["tokens"][0, :, :48]))
    np.testing.assert_allclose(logits, arrays["logits_after"], atol=5e-6)
    for i, layer in enumerate(state):
        wkv = arrays[f"state_after/blocks.{i}.att.wkv"]
        wkv = wkv.swapaxes(1, 2) if kind == "rwkv7" else wkv  # the package stores [value, key] for this version
        np.testing.assert_allclose(layer.wkv[0], wkv, atol=2e-5)
        for ours, theirs in ((layer.att_last, "att"), (layer.ffn_last, "ffn")):
            np.testing.assert_allclose(ours[0], arrays[f"state_after/blocks.{i}.{theirs}.shift"], atol=2e-6)
