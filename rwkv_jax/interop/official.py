"""BlinkDL's RWKV-4 state dicts and our parameters: the same names, translated by rule.

Theirs is flat, one entry a layer, with matrices [out, in], `time_mix_*` [1, 1, D] and ln0 inside block 0.
Ours is a tree, layers stacked or one by one, with kernels [in, out] and `time_mix_*` [D].
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
from rwkv_jax.models import KINDS, build, parameter_shapes

# Parts of names that tell a later version, in this order: 6 and 7 have ln_x too.
_LATER_VERSIONS = {".att.r_k": "RWKV-7", ".att.time_maa": "RWKV-6", ".att.ln_x.": "RWKV-5"}


def from_official(
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    sharding: Any = None,
    scan: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """Model and parameters of a released RWKV-4 state dict, whose names and shapes tell all sizes.

    Args:
      tensors: arrays by official name, perhaps memory-mapped: each is read once, into its final place.
      dtype: of the parameters; None keeps each tensor's own. `time_decay` and `time_first` are float32 at
        least. Activations have the parameters' dtype (the head's, where they differ), but float32 for float16:
        a residual stream leaves float16's range (the released code halves it every 6 layers).
      sharding: None for the default device, one `jax.sharding.Sharding`, or a tree of them like the parameters.
      scan: layers stacked [L, ...], or one set of parameters a layer.
      fields: arguments of `build`, perhaps from a stranger's file: `tensors` are then those of this model, of any
        kind, as `to_official` names them.

    Raises:
      ValueError: weights of another version; a key is missing, unknown, not of floats or of another shape; `fields`
        are not those of a model.
    """
    tensors = without_prefix(tensors)
    model = model_of(tensors, dtype, scan, fields)
    return model, _placed(tensors, model, dtype, sharding)


def model_of(
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    scan: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model of `from_official`; no tensor is read."""
    chosen = _released_fields(tensors) if fields is None else fields
    L = layer_count(tensors)
    if chosen.get("num_layers") != L:  # before a model of a billion layers is built
        raise ValueError(f"model field num_layers is {chosen.get('num_layers')!r}, and there are {L} layers")
    try:
        model = build("rwkv4", **{**chosen, "scan": scan})
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


def _released_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The sizes of the RWKV-4 model that a state dict holds."""
    refuse_later_versions(tensors)
    V, D = _matrix_shape(tensors, "emb.weight")
    F, _ = _matrix_shape(tensors, "blocks.0.ffn.key.weight")
    return {"vocab_size": V, "num_layers": layer_count(tensors), "dim": D, "hidden_dim": F}


def _placed(tensors: Mapping[str, np.ndarray], model: nn.Module, dtype: str | None, sharding: Any) -> Any:
    """The parameters of `model` on their devices; each tensor keeps its own dtype where `dtype` is None."""
    shapes = parameter_shapes(model)
    shardings = flatten_dict(sharding_tree(sharding, shapes))
    shapes = flatten_dict(shapes)
    params = {}
    # Largest first: a leaf's copy on its way in then never comes on top of a whole model.
    order = sorted(shapes, key=lambda path: -math.prod(shapes[path].shape))
    for path in tqdm(order, "weights", unit="array", disable=None):
        names = _official_names(path, shapes[path].shape, len(model.layers), model.layers_apart)
        layers = [_oriented(path, tensors[name]) for name in names]
        kept = functools.reduce(jnp.promote_types, [x.dtype for x in layers])
        keeps = dtype is None and not _kept_wide("/".join(path))
        wanted = float_dtype(kept) if keeps else shapes[path].dtype
        read = functools.partial(_part, layers, path[0] == "blocks", wanted)
        params[path] = place(read, shapes[path].shape, shardings[path])
    return unflatten_dict(params)


def to_official(params: Any) -> dict[str, np.ndarray]:
    """The official state dict of RWKV-4 parameters in either layout: NumPy views, matrices [out, in].

    Other kinds of layer are named by the same rule, for files of ours.
    """
    out = {}
    period = sum(name.startswith("block_") for name in params.get("blocks", {})) or 1
    apart = sum(name.startswith("blocks_") for name in params)
    for path, x in flatten_dict(params).items():
        names = _official_names(path, x.shape, period, apart)
        layers = np.asarray(x) if path[0] == "blocks" else np.asarray(x)[None]
        for name, layer in zip(names, layers, strict=True):
            out[name] = layer[None, None] if path[-1].startswith("time_mix") else _oriented(path, layer)
    return out


def without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without the prefix that DeepSpeed leaves on names."""
    return {name.removeprefix("_forward_module."): x for name, x in tensors.items()}


def refuse_later_versions(names: Iterable[str]) -> None:
    """
    Raises:
      ValueError: one of the names tells RWKV-5, 6 or 7.
    """
    for part, version in _LATER_VERSIONS.items():
        key = next((name for name in names if part in name), None)
        if key is not None:
            raise ValueError(f"{version} weights (they have {key!r}); only RWKV-4 is supported")


def layer_count(names: Iterable[str]) -> int:
    """L, the number of different layers in official names."""
    return len({name.split(".")[1] for name in names if re.match(r"blocks\.\d+\.", name)})


def check(tensors: Mapping[str, np.ndarray], model: nn.Module) -> None:
    """Compare the names, shapes and dtypes of tensors with the parameters of a model.

    Raises:
      ValueError: naming the first key that is missing, unknown, not of floats or of another shape.
    """
    expected = {}
    for path, leaf in flatten_dict(parameter_shapes(model)).items():
        shape = leaf.shape[1:] if path[0] == "blocks" else leaf.shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        shape = (1, 1, *shape) if path[-1].startswith("time_mix") else shape
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
    """`sharding` for each leaf of `shapes`: one or None for all, or already a tree of that structure."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda _: sharding, shapes)
    if jax.tree.structure(sharding) != jax.tree.structure(shapes):
        kind = type(sharding).__name__
        raise ValueError(f"sharding is a {kind}; expected None, a Sharding, or a tree of them like the parameters")
    return sharding


def place(read: Callable, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The array whose part at `index`, a tuple of slices, is `read(index)`, a copy, which the array may take over.

    A host reads the parts of its devices.
    """
    if sharding is None:
        # `jnp.asarray` would compile a program for each shape
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def float_dtype(dtype: Any) -> str:
    """The name of a floating-point dtype as JAX will store it (float64 only where it is enabled)."""
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
    if name not in tensors:
        raise ValueError(f"no RWKV-4 weights: {name!r} is not among the {len(tensors)} keys {list(tensors)[:3]}")
    if tensors[name].ndim != 2:
        raise ValueError(f"{name!r} has shape {tensors[name].shape}, expected a matrix")
    return tensors[name].shape


def _kept_wide(path: str) -> bool:
    """Return whether a parameter stays float32 or wider when the others are narrower."""
    return any(kind.kept_wide and re.search(kind.kept_wide, path) for kind in KINDS.values())


def _official_names(path: tuple[str, ...], shape: tuple[int, ...], period: int, apart: int) -> list[str]:
    """Names of a leaf of our tree in a state dict, one a layer where it is stacked.

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


def _oriented(path, x: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        return x.T
    return x.reshape(-1) if path[-1].startswith("time_mix") else x


def _part(layers: list[np.ndarray], stacked: bool, dtype, index: tuple[slice, ...]) -> np.ndarray:
    """A copy of layers[index] for stacked layers, of layers[0][index] for a leaf of one."""
    if not stacked:
        return np.array(layers[0][index], dtype, order="C")
    return np.stack([x[index[1:]] for x in layers[index[0]]], dtype=dtype, casting="unsafe")
