"""Tiny weights made without compiling a program, and comparisons of tensors bit for bit."""

import contextlib
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import drawn

import rwkv_jax

V, L, D, F = 11, 2, 8, 24
DECAYS = ("time_decay", "time_first")  # float32 in every model, with the next two of later versions
KEPT_WIDE = (*DECAYS, "time_faaaa", "w0")
RELEASED = {  # fields of `tiny` by kind
    "rwkv4": {},
    "rwkv5": {"head_size": 4},
    "rwkv6": {"head_size": 4, "low_ranks": (3, 5)},
    "rwkv7": {"head_size": 4, "low_ranks": (3, 5, 2, 6)},
}
NAMES = {
    "pth": "m.pth",
    "safetensors": "m.safetensors",
    "huggingface": "m",
    "rwkv.cpp": "m.bin",
}  # names of files, by format

MATRICES = {
    "att.key": (D, D),
    "att.value": (D, D),
    "att.receptance": (D, D),
    "att.output": (D, D),
    "ffn.key": (F, D),
    "ffn.receptance": (D, D),
    "ffn.value": (D, F),
}
LAYER_SHAPES = {
    **{f"{name}.weight": shape for name, shape in MATRICES.items()},
    **{f"{norm}.{leaf}": (D,) for norm in ("ln1", "ln2") for leaf in ("weight", "bias")},
    **{f"att.{name}": (D,) for name in DECAYS},
    **{f"att.time_mix_{x}": (1, 1, D) for x in "kvr"},
    **{f"ffn.time_mix_{x}": (1, 1, D) for x in "kr"},
}


def official_shapes(num_layers=L):
    """The names and shapes of a released state dict."""
    return {
        "emb.weight": (V, D),
        "head.weight": (V, D),
        **{f"{norm}.{leaf}": (D,) for norm in ("blocks.0.ln0", "ln_out") for leaf in ("weight", "bias")},
        **{f"blocks.{i}.{name}": shape for i in range(num_layers) for name, shape in LAYER_SHAPES.items()},
    }


def official(dtype=np.float32, num_layers=L):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in official_shapes(num_layers).items()}


@functools.cache
def tiny(dtype="float32", scan=True, kind="rwkv4", **fields):
    """(model, params) as `load` returns them for an official file with weights of `dtype`."""
    sizes = {"vocab_size": V, "num_layers": L, "dim": D, "hidden_dim": F}
    model, params = drawn(rwkv_jax.build(kind, **(sizes | RELEASED[kind] | fields)))
    keeps = lambda path: path[-1].key in KEPT_WIDE
    params = jax.tree.map_with_path(lambda path, x: x if keeps(path) else x.astype(jnp.dtype(dtype)), params)
    model = model.clone(scan=scan, dtype="float32" if dtype == "float16" else dtype, param_dtype=dtype)
    return model, params if scan else rwkv_jax.unstack(params)


@functools.cache
def trained(kind):
    """(tensors after 150 steps of the released trainer, all arrays of the file): 3 layers, 2 heads of 32 channels."""
    with np.load(Path(__file__).parent / "goldens" / f"official_trajectory{kind[-1]}.npz") as arrays:
        arrays = dict(arrays)
    return {k.removeprefix("final/"): x for k, x in arrays.items() if k.startswith("final/")}, arrays


def write_workdir(path, model, params, *steps):
    """A training run whose checkpoint of step n holds n times the parameters."""
    from rwkv_jax import checkpoint  # here, because Orbax takes seconds to import

    path.mkdir(exist_ok=True)
    sizes = {"vocab_size": V, "num_layers": L, "dim": D, "hidden_dim": F, "layers": list(model.layers)}
    config = {"model": {"name": "rwkv4", "scan": model.scan, **sizes}, "corpus": "none"}
    (path / "config.json").write_text(json.dumps(config))
    for step in steps:
        state = {"step": np.int32(step), "params": jax.tree.map(lambda x, s=step: x * np.float32(s), params)}
        checkpoint.save(path / "checkpoints", step, state | {"opt_state": (np.zeros(3),)})


def assert_same_tensors(actual, expected):
    """Check that two dicts of tensors are bit-equal."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


def assert_same_params(actual, expected):
    """Check that two trees of parameters are bit-equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@contextlib.contextmanager
def one_line(match, error=ValueError):
    """Expects an error whose message matches, in one short line."""
    with pytest.raises(error, match=match) as raised:
        yield
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
