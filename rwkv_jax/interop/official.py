"""BlinkDL's state dicts of RWKV-4, 5.2, 6 and 7, and our parameters: the same names, translated by rule.

Theirs is flat, one entry a layer, with matrices [out, in], most vectors [1, 1, D] and ln0 inside block 0.
Ours is a tree, layers stacked or one by one, with kernels [in, out] and vectors [D].
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from rwkv_jax import files
from rwkv_jax.interop import formats
from rwkv_jax.models import KINDS, build, parameter_shapes
from rwkv_jax.models.block import RELEASED_EPSILON
from rwkv_jax.models.kinds import DEFAULT

# Vectors that are [1, 1, D] in a state dict, by the last part of their names; see `_lifted` for one more.
VECTORS = re.compile(r"(?:.*\.)?(time_mix_\w|time_maa_[a-z]|x_[a-z]|[wav]0|k_k|k_a)$")
# Not parameters: the value residual of RWKV-7 in the first layer, which has none, and tuned initial states.
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]$|blocks\.\d+\.att\.time_state$")
# The `rwkv` package infers the version and the heads from the names read so far: these must come first.
_TELLING = re.compile(r"blocks\.\d+\.att\.(time_maa_\w+|gate\.weight)$")
# Parts of names that identify unsupported versions.
_OTHERS = {
    ".ffn.s_emb": "RWKV-7 with deep embeddings",
    "emb_x": "RWKV-7 with deep embeddings",
    ".qkv.": "RWKV-7 with attention",
    "rosa": "RWKV-8",
    ".time_maa_rkvw": "RWKV-6b",
    ".att.gate_w": "RWKV-6a",
}


def from_official(
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    sharding: Any = None,
    scan: bool = True,
    fields: Mapping[str, Any] | None = None,
    head_norm_epsilon: float = RELEASED_EPSILON,
) -> tuple[nn.Module, Any]:
    """Return model and parameters of a released state dict, whose names and shapes give its version and sizes.

    Args:
      tensors: arrays by official name, perhaps memory-mapped: each is read once, into its final place.
      dtype: of the parameters; None keeps each tensor's own. Decays, and the bonuses of RWKV-4, 5 and 6, are
        float32 at least.
        Activations have the parameters' dtype (the head's, where they differ), but float32 for float16:
        a residual stream exceeds float16's range (the released code halves it every 6 layers).
      sharding: None for the default device, one `jax.sharding.Sharding`, or a tree of them like the parameters.
      scan: layers stacked [L, ...], or one set of parameters a layer.
      fields: arguments of `build`, perhaps untrusted: `tensors` are then those of this model, of any kind, as
        `to_official` names them.
      head_norm_epsilon: of the runtime that the tensors are for; they do not contain it. `fields` have their own.

    Raises:
      ValueError: weights of another version; a key is missing, unknown, not of floats or of another shape; `fields`
        are not those of a model; a number is beyond the range of `dtype`.
    """
    tensors = without_prefix(tensors)
    model = model_of(tensors, dtype, scan, fields, head_norm_epsilon)
    return model, _placed(tensors, model, dtype, sharding)


def model_of(
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    scan: bool = True,
    fields: Mapping[str, Any] | None = None,
    head_norm_epsilon: float = RELEASED_EPSILON,
) -> nn.Module:
    """Return the model of `from_official`; no tensor is read."""
    chosen = _released_fields(tensors) | {"head_norm_epsilon": head_norm_epsilon} if fields is None else fields
    L = layer_count(tensors)
    if chosen.get("num_layers") != L:  # before a model of a billion layers is built
        raise ValueError(f"model field num_layers is {chosen.get('num_layers')!r}, and there are {L} layers")
    try:
        model = build(DEFAULT, **{**chosen, "scan": scan})
        parameter_shapes(model)
    except Exception as error:  # a field of a wrong type can make a model raise nearly anything
        raise ValueError(f"its fields are not those of a model: {files.one_line(error)}") from error
    check(tensors, model)
    if fields is None and dtype is None:
        dtype = tensors["head.weight"].dtype
    if dtype is None:
        return model
    stored = float_dtype(dtype)
    return model.clone(dtype=activation_dtype(stored), param_dtype=stored)


def _released_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of `build` for the released model that a state dict holds."""
    V, D = _matrix_shape(tensors, "emb.weight")
    kind = version_of(tensors)
    F, _ = _matrix_shape(tensors, "blocks.0.ffn.key.weight")
    L = layer_count(tensors)
    fields = {**KINDS[kind].fields, "layers": (kind,), "vocab_size": V, "num_layers": L, "dim": D, "hidden_dim": F}
    width = lambda name, layer=0: _matrix_shape(tensors, f"blocks.{layer}.att.{name}")[1]
    if kind == "rwkv5":
        fields["head_size"] = width("time_decay")
    elif kind == "rwkv6":
        fields |= {"head_size": width("time_faaaa"), "low_ranks": (width("time_maa_w1") // 5, width("time_decay_w1"))}
    elif kind == "rwkv7":
        rank_v = width("v1", L - 1) if f"blocks.{L - 1}.att.v1" in tensors else width("a1")
        fields |= {"head_size": width("r_k"), "low_ranks": (width("w1"), width("a1"), rank_v, width("g1"))}
    return fields


def version_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the kind of layer of a released state dict, detected from its names and shapes.

    All layers are searched, so that a missing tensor does not change the version.

    Raises:
      ValueError: the version is not supported.
    """
    for part, version in _OTHERS.items():
        if (key := next((name for name in tensors if part in name), None)) is not None:
            raise ValueError(f"{version} weights (they have {key!r}); RWKV-4, 5.2, 6 and 7 are supported")
    has = lambda part: any(f".att.{part}" in name for name in tensors)
    if has("r_k") or has("k_k") or has("x_r"):
        return "rwkv7"
    if has("time_maa_"):
        return "rwkv6"
    if not has("ln_x.weight"):
        return "rwkv4"
    decays = [x for name, x in tensors.items() if name.endswith(".att.time_decay")]
    if not has("gate.weight") or not any(x.ndim == 2 and x.shape[1] > 1 for x in decays):
        found = "5.1 weights (one decay a head)" if has("gate.weight") else "5.0 weights (5.1 in rwkv.cpp's count)"
        raise ValueError(f"RWKV-{found}; RWKV-4, 5.2, 6 and 7 are supported")
    return "rwkv5"


def _placed(tensors: Mapping[str, np.ndarray], model: nn.Module, dtype: str | None, sharding: Any) -> Any:
    """Return the parameters of `model` on their devices; each tensor keeps its own dtype where `dtype` is None."""
    shapes = parameter_shapes(model)
    shardings = flatten_dict(sharding_tree(sharding, shapes))
    shapes = flatten_dict(shapes)
    params = {}
    # Largest first, so that a leaf's temporary copy never adds to a whole model.
    order = sorted(shapes, key=lambda path: -math.prod(shapes[path].shape))
    for path in tqdm(order, "weights", unit="array", disable=None):
        names = _official_names(path, shapes[path].shape, len(model.layers), model.layers_apart)
        one = shapes[path].shape[1:] if path[0] == "blocks" else shapes[path].shape
        layers = [tensors[name].T if path[-1] == "kernel" else tensors[name].reshape(one) for name in names]
        kept = functools.reduce(jnp.promote_types, [x.dtype for x in layers])
        keeps = dtype is None and not _kept_wide("/".join(path))
        wanted = float_dtype(kept) if keeps else shapes[path].dtype
        read = functools.partial(_part, names, layers, path[0] == "blocks", wanted)
        # Blocking: on a busy machine the copies of several leaves would else be in memory at a time.
        params[path] = jax.block_until_ready(place(read, shapes[path].shape, shardings[path]))
    return unflatten_dict(params)


def to_official(params: Any) -> dict[str, np.ndarray]:
    """Return the official state dict of parameters in either layout: NumPy views, matrices [out, in].

    Kinds of layer without released weights are named by the same rule, for files of ours.
    """
    out = {}
    period = sum(name.startswith("block_") for name in params.get("blocks", {})) or 1
    apart = sum(name.startswith("blocks_") for name in params)
    leaves = flatten_dict(params)
    for path, x in leaves.items():
        names = _official_names(path, x.shape, period, apart)
        layers = np.asarray(x) if path[0] == "blocks" else np.asarray(x)[None]
        for name, layer in zip(names, layers, strict=True):
            out[name] = layer.T if path[-1] == "kernel" else layer[None, None] if _lifted(path, leaves) else layer
    return dict(sorted(out.items(), key=lambda item: not _TELLING.match(item[0])))


def without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors without DeepSpeed's prefix of names, and without those that are not parameters."""
    named = {name.removeprefix("_forward_module."): x for name, x in tensors.items()}
    return {name: x for name, x in named.items() if not _UNUSED.match(name)}


def layer_count(names: Iterable[str]) -> int:
    """Return L, the number of different layers in official names."""
    return len({name.split(".")[1] for name in names if re.match(r"blocks\.\d+\.", name)})


def check(tensors: Mapping[str, np.ndarray], model: nn.Module) -> None:
    """Compare the names, shapes and dtypes of tensors with the parameters of a model.

    Raises:
      ValueError: naming the first key that is missing, unknown, not of floats or of another shape.
    """
    expected, leaves = {}, flatten_dict(parameter_shapes(model))
    for path, leaf in leaves.items():
        shape = leaf.shape[1:] if path[0] == "blocks" else leaf.shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        shape = (1, 1, *shape) if _lifted(path, leaves) else shape
        names = _official_names(path, leaf.shape, len(model.layers), model.layers_apart)
        expected |= dict.fromkeys(names, shape)
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        raise ValueError(f"key {min(missing)!r} is missing ({len(missing)} of the {len(expected)} expected are)")
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r} (1 of {len(unknown)} beyond the {len(expected)} expected)")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name!r} has shape {tensors[name].shape}, expected {shape}")
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            raise ValueError(f"{name!r} has dtype {tensors[name].dtype}, expected floating point")


def sharding_tree(sharding: Any, shapes: Any) -> Any:
    """Return a sharding for each leaf of `shapes`, from one or None for all, or from a tree of that structure."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda _: sharding, shapes)
    if jax.tree.structure(sharding) != jax.tree.structure(shapes):
        kind = type(sharding).__name__
        raise ValueError(f"sharding is a {kind}; expected None, a Sharding, or a tree of them like the parameters")
    return sharding


def place(read: Callable, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Return the array whose part at `index`, a tuple of slices, is `read(index)`, a copy that the array may own.

    A host reads only the parts of its devices.
    """
    if sharding is None:
        # `jnp.asarray` would compile a program for each shape
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def float_dtype(dtype: Any) -> str:
    """Return the name of a floating-point dtype as JAX will store it (float64 only where it is enabled)."""
    try:
        name = jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)).name
    except TypeError:
        name = ""
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"dtype is {str(dtype)!r}, expected 'float32', 'bfloat16' or 'float16'")
    return name


def activation_dtype(param_dtype: str) -> str:
    return "float32" if param_dtype == "float16" else param_dtype


def _matrix_shape(tensors, name) -> tuple[int, int]:
    if name not in tensors and name.startswith("blocks."):
        raise ValueError(f"key {name!r} is missing among {len(tensors)} tensors")
    if name not in tensors:
        raise ValueError(f"not RWKV weights: {name!r} is not among the {len(tensors)} keys {list(tensors)[:3]}")
    if tensors[name].ndim != 2:
        raise ValueError(f"{name!r} has shape {tensors[name].shape}, expected a matrix")
    return tensors[name].shape


def _kept_wide(path: str) -> bool:
    """Return whether a parameter stays float32 or wider when the others are narrower."""
    return any(kind.kept_wide and re.search(kind.kept_wide, path) for kind in KINDS.values())


def _official_names(path: tuple[str, ...], shape: tuple[int, ...], period: int, apart: int) -> list[str]:
    """Return the names of a leaf of our tree in a state dict, one a layer if it is stacked.

    Args:
        period: layers in the repeating unit, which a stacked hybrid keeps apart as block_0, block_1, ...
        apart: layers before the stacked ones.
    """
    first, *rest = path
    rest[-1] = "weight" if rest[-1] in ("kernel", "scale", "embedding") else rest[-1]
    if first == "blocks":
        offset = apart + (int(rest.pop(0).removeprefix("block_")) if period > 1 else 0)
        return [".".join(["blocks", str(offset + i * period), *rest]) for i in range(shape[0])]
    first = "blocks.0.ln0" if first == "ln0" else first.replace("blocks_", "blocks.")
    return [".".join([first, *rest])]


def _lifted(path: tuple[str, ...], leaves: Mapping[tuple, Any]) -> bool:
    """Return whether a leaf is [1, 1, D] for each layer of a state dict; time_decay is in RWKV-6, but not in 4."""
    of_rwkv6 = path[-1] == "time_decay" and (*path[:-1], "time_maa_x") in leaves
    return of_rwkv6 or (len(path) > 2 and VECTORS.match(path[-1]) is not None)


def _part(names: list[str], layers: list[np.ndarray], stacked: bool, dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Copy layers[index] of stacked layers, or layers[0][index] of a single one."""
    first, rest = (index[0], index[1:]) if stacked else (slice(None), index)
    parts = [x[rest] for x in layers[first]]
    copy = np.empty((len(parts), *parts[0].shape), dtype)
    for name, x, to in zip(names[first], parts, copy, strict=True):
        formats.copied(name, x, to)
    return copy if stacked else copy[0]
