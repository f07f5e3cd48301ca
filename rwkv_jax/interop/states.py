"""An RWKV-4 state <-> the layouts in which other implementations keep theirs.

Ours is a tuple of `models.rwkv4.LayerState`, one a layer, leaves [B, D]. Theirs hold the same five vectors a layer:

    rwkv (the package)                    flat list of 5 L arrays [D]: att_last, num, den, log_scale, ffn_last
    transformers                          list of 5 arrays [B, D, L]: ffn_last, att_last, num, den, log_scale
    Production-RWKV, ChatRWKV's model_run [5 L, D], rows of a layer: ffn_last, att_last, num, den, log_scale

Everything is NumPy, float32; lists may hold any arrays that NumPy reads, such as CPU tensors. A channel that has read
nothing (num = den = 0) has any log_scale: written is the one that the reader starts from, -1e38 in transformers and
-1e30 in the others; read, whatever it was, it becomes our own -1e38.
"""

from collections.abc import Sequence

import jax
import numpy as np

from rwkv_jax.models.rwkv4 import LayerState
from rwkv_jax.ops.wkv4 import EMPTY, WKV4State

NAMES = ("att_last", "num", "den", "log_scale", "ffn_last")
_OTHERS = (4, 0, 1, 2, 3)  # ffn_last first


def to_rwkv(state) -> list[np.ndarray]:
    """For `rwkv.model.RWKV.forward`, as tensors. ValueError unless the state is RWKV-4, finite and of batch 1."""
    values_L5D = _one_row(_vectors(state, -1e30))
    return [values_D.copy() for values_5D in values_L5D for values_D in values_5D]


def from_rwkv(arrays: Sequence) -> tuple[LayerState, ...]:
    """Our state, B = 1. ValueError unless `arrays` are 5 L finite vectors of one length."""
    values_ND = _stacked(arrays, "5 vectors [D] a layer", ndim=1)
    return _layers(_per_layer(values_ND)[:, :, None])


def to_transformers(state) -> list[np.ndarray]:
    """For `RwkvForCausalLM.forward(state=...)`, as tensors. ValueError unless the state is RWKV-4 and finite."""
    return list(np.moveaxis(_vectors(state, -1e38)[:, _OTHERS], 0, -1).copy())


def from_transformers(arrays: Sequence) -> tuple[LayerState, ...]:
    """Our state. ValueError unless `arrays` are 5 finite arrays of one shape [B, D, L]."""
    values_5BDL = _stacked(arrays, "5 arrays [B, D, L]", ndim=3)
    if len(values_5BDL) != 5:
        raise ValueError(f"the state has {len(values_5BDL)} arrays, expected 5 arrays [B, D, L]")
    return _layers(np.moveaxis(values_5BDL, -1, 0)[:, np.argsort(_OTHERS)])


def to_production(state) -> np.ndarray:
    """[5 L, D]. ValueError unless the state is RWKV-4, finite and of batch 1."""
    values_L5D = _one_row(_vectors(state, -1e30))[:, _OTHERS]
    return values_L5D.reshape(-1, values_L5D.shape[-1])


def from_production(array_ND) -> tuple[LayerState, ...]:
    """Our state, B = 1. ValueError unless the array is finite and [5 L, D]."""
    values_ND = _stacked(array_ND, "an array [5 L, D]", ndim=1)
    return _layers(_per_layer(values_ND)[:, np.argsort(_OTHERS), None])


def _vectors(state, empty_scale: float) -> np.ndarray:
    """[L, 5, B, D] in the order of `NAMES`."""
    if not isinstance(state, Sequence) or not state or not all(isinstance(layer, LayerState) for layer in state):
        raise ValueError("expected the state of an RWKV-4 model, a LayerState a layer")
    layers = [(layer.att_last, *layer.wkv, layer.ffn_last) for layer in jax.device_get(tuple(state))]
    values = _stacked([x for layer in layers for x in layer], "leaves [B, D] of one shape", ndim=2)
    return _with_empty_scale(values.reshape(len(layers), 5, *values.shape[1:]), empty_scale)


def _layers(values_L5BD: np.ndarray) -> tuple[LayerState, ...]:
    values = _with_empty_scale(values_L5BD, EMPTY)
    return tuple(LayerState(att, WKV4State(num, den, scale), ffn) for att, num, den, scale, ffn in values)


def _with_empty_scale(values_L5BD: np.ndarray, empty_scale: float) -> np.ndarray:
    att, num, den, scale, ffn = np.moveaxis(values_L5BD, 1, 0)
    scale = np.where((num == 0) & (den == 0), np.float32(empty_scale), scale)
    return np.stack([att, num, den, scale, ffn], axis=1)


def _stacked(arrays, expected: str, ndim: int) -> np.ndarray:
    try:
        arrays = [np.asarray(x) for x in arrays]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state is not {expected}: {error}") from None
    shapes = sorted({x.shape for x in arrays})
    if len(shapes) != 1 or len(shapes[0]) != ndim or 0 in shapes[0]:
        raise ValueError(f"the state has shapes {', '.join(map(str, shapes)) or 'none'}, expected {expected}")
    values = np.stack(arrays).astype(np.float32)
    if not np.isfinite(values).all():
        bad = next(i for i, x in enumerate(values) if not np.isfinite(x).all())
        raise ValueError(f"array {bad} of the state holds values that are not finite")
    return values


def _per_layer(values_ND: np.ndarray) -> np.ndarray:
    if len(values_ND) % 5:
        raise ValueError(f"the state has {len(values_ND)} vectors, expected 5 a layer")
    return values_ND.reshape(-1, 5, values_ND.shape[-1])


def _one_row(values_L5BD: np.ndarray) -> np.ndarray:
    if (B := values_L5BD.shape[2]) != 1:
        raise ValueError(f"the state has {B} rows, and this layout holds one: convert them one by one")
    return values_L5BD[:, :, 0]
