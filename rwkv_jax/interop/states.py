"""Recurrent states <-> those of the `rwkv` package, and tuned initial states <-> `time_state` of released files.

A state of the package is a flat list of arrays without a batch axis, here NumPy and float32. Those of each layer:

    RWKV-4      att_last, num, den, log_scale, ffn_last: vectors [D]
    RWKV-5, 6   att_last [D], the matrices [H, K, V], ffn_last [D]
    RWKV-7      att_last [D], the matrices [H, V, K], ffn_last [D]

The package modifies the arrays of RWKV-7 in-place: give it copies of what you keep. In a channel of RWKV-4 that has
read nothing (num = den = 0) every log_scale is equivalent: theirs is -1e30 at the start, ours -1e38.

`time_state` is [H, V, K] in every version. It holds the matrices alone: both vectors of a layer start as zero.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.interop import formats
from rwkv_jax.models import unstack
from rwkv_jax.models.block import Kind

TIME_STATE = ".att.time_state"  # after the layer, in the names of a released file


def to_rwkv(model, state) -> list[np.ndarray]:
    """Return the arrays of a state, which `rwkv.model.RWKV.forward` takes as tensors.

    Raises:
      ValueError: the package does not run this model, or the state is not a finite one of it with batch 1.
    """
    kind, empty = _kind_and_empty(model)
    state = jax.device_get(tuple(state) if isinstance(state, Sequence) else state)
    if jax.tree.structure(state) != jax.tree.structure(empty):
        raise ValueError(f"expected the state of this model, a tuple of {len(empty)} layers")
    for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True):
        if np.shape(x)[1:] != wanted.shape:
            raise ValueError(f"an array of the state is {np.shape(x)}, expected {(1, *wanted.shape)}")
        if (B := len(x)) != 1:
            raise ValueError(f"the state has {B} rows, expected one: convert rows one by one")
    arrays = [x for layer in jax.tree.map(lambda x: x[0], state) for x in kind.to_rwkv(layer)]
    return [_checked(i, x) for i, x in enumerate(arrays)]


def from_rwkv(model, arrays: Sequence) -> tuple:
    """Return a state of this model, B = 1, from any arrays that NumPy reads, such as CPU tensors.

    Raises:
      ValueError: the package does not run this model, or `arrays` are not the finite ones of its state.
    """
    kind, empty = _kind_and_empty(model)
    expected = [x.shape for layer in empty for x in kind.to_rwkv(layer)]
    each = len(expected) // len(empty)
    try:
        arrays = [np.asarray(x) for x in arrays]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state is not a list of arrays: {error}") from None
    if len(arrays) != len(expected):
        raise ValueError(f"the state has {len(arrays)} arrays, expected {len(expected)}, {each} a layer")
    for i, (x, shape) in enumerate(zip(arrays, expected, strict=True)):
        if x.shape != shape:
            raise ValueError(f"array {i} of the state is {x.shape}, expected {shape}")
    arrays = [_checked(i, x) for i, x in enumerate(arrays)]
    layers = tuple(kind.from_rwkv(arrays[i : i + each]) for i in range(0, len(arrays), each))
    return jax.tree.map(lambda x: x[None], layers)


def _kind_and_empty(model) -> tuple[Kind, tuple]:
    """Return the kind of all layers, and the empty state as zeros without the batch axis."""
    name, kind, _ = model.unit[0]
    if kind.to_rwkv is None or any(other != name for other, _, _ in model.unit) or model.variant:
        found = ", ".join([repr(name) for name, _, _ in model.unit] + [f"{k}={v!r}" for k, v in model.variant.items()])
        raise ValueError(f"the rwkv package runs released RWKV models only, and this one has {found}")
    shapes = jax.eval_shape(lambda: model.init_state(1))
    return kind, jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float32), shapes)


def _checked(i: int, x: np.ndarray) -> np.ndarray:
    """Return a float32 copy; ValueError unless it is finite."""
    x = formats.copied(f"array {i} of the state", x, np.empty(x.shape, np.float32))
    if not np.isfinite(x).all():
        raise ValueError(f"array {i} of the state holds values that are not finite")
    return x


def to_time_state(tuned) -> dict[str, np.ndarray]:
    """Return a tuned state, a tree as `Kind.tuned_start` of each layer, as the tensors of a released file.

    Raises:
      ValueError: released files have no tuned state of this kind of layer.
    """
    layers = unstack(jax.device_get(tuned))
    if other := next((sorted(layer) for layer in layers.values() if layer.keys() != {"wkv"}), None):
        raise ValueError(f"no released form of a tuned state that has {', '.join(other)}; expected matrices alone")
    return {name.replace("_", ".") + TIME_STATE: layer["wkv"].swapaxes(1, 2) for name, layer in layers.items()}


def from_time_state(model, tensors: Mapping[str, np.ndarray]) -> tuple:
    """Return the state before the first token, B = 1, from the `tensors` of a released file; others are ignored.

    Raises:
      ValueError: a layer's is missing, has another shape, or holds no finite floats; there are more layers than the
        model has; or a layer's state cannot be tuned in this way.
    """
    layers, known = [], [f"blocks.{i}{TIME_STATE}" for i in range(model.num_layers)]
    if other := next((key for key in tensors if key.endswith(TIME_STATE) and key not in known), None):
        raise ValueError(f"unknown key {other!r}, expected the tuned state of {model.num_layers} layers")
    for i, (name, kind, config) in enumerate(model.every_layer):
        start = jax.eval_shape(lambda k=kind, c=config: k.tuned_start(c)) if kind.tuned_start else {}
        if start.keys() != {"wkv"}:
            raise ValueError(f"no released file has a tuned state of {name!r} layers")
        H, K, V = start["wkv"].shape
        key = known[i]
        if key not in tensors:
            raise ValueError(f"key {key!r} is missing, expected the tuned state of {model.num_layers} layers")
        if tensors[key].shape != (H, V, K):
            raise ValueError(f"{key!r} has shape {tensors[key].shape}, expected {(H, V, K)}")
        if not jnp.issubdtype(tensors[key].dtype, jnp.floating):
            raise ValueError(f"{key!r} has dtype {tensors[key].dtype}, expected floating point")
        wkv_HKV = tensors[key].swapaxes(1, 2)
        copy = formats.copied(key, wkv_HKV, np.empty(wkv_HKV.shape, start["wkv"].dtype))
        if not np.isfinite(copy).all():
            raise ValueError(f"{key!r} holds values that are not finite")
        layers.append(jax.tree.map(lambda x: np.asarray(x)[None], kind.tuned_state({"wkv": copy})))
    return tuple(layers)
