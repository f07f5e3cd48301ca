"""An RWKV-4 state <-> the state of the `rwkv` package: a flat list of 5 L vectors [D], NumPy and float32.

Ours is a tuple of `models.rwkv4.LayerState`, one a layer, leaves [1, D]; theirs lists att_last, num, den, log_scale
and ffn_last of each layer. In a channel that has read nothing (num = den = 0) any log_scale means the same: theirs is
-1e30 at the start, ours -1e38.
"""

from collections.abc import Sequence

import jax
import numpy as np

from rwkv_jax.interop import formats
from rwkv_jax.models.rwkv4 import LayerState
from rwkv_jax.ops.wkv4 import EMPTY, WKV4State


def to_rwkv(state) -> list[np.ndarray]:
    """For `rwkv.model.RWKV.forward`, as tensors. ValueError unless the state is RWKV-4, finite and of batch 1."""
    if not isinstance(state, Sequence) or not state or not all(isinstance(layer, LayerState) for layer in state):
        raise ValueError("expected the state of an RWKV-4 model, a LayerState a layer")
    leaves = [x for layer in jax.device_get(tuple(state)) for x in (layer.att_last, *layer.wkv, layer.ffn_last)]
    values_NBD = _stacked(leaves, "leaves [B, D] of one shape", ndim=2)
    if (B := values_NBD.shape[1]) != 1:
        raise ValueError(f"the state has {B} rows, and theirs holds one: convert them one by one")
    return list(_with_empty_scale(values_NBD[:, 0], -1e30))


def from_rwkv(arrays: Sequence) -> tuple[LayerState, ...]:
    """Our state, B = 1, from any arrays that NumPy reads, such as CPU tensors.

    Raises:
      ValueError: `arrays` are not 5 L finite vectors of one length.
    """
    values_ND = _stacked(arrays, "5 vectors [D] a layer", ndim=1)
    if len(values_ND) % 5:
        raise ValueError(f"the state has {len(values_ND)} vectors, expected 5 a layer")
    values_L51D = _with_empty_scale(values_ND, EMPTY).reshape(-1, 5, 1, values_ND.shape[1])
    return tuple(LayerState(att, WKV4State(num, den, scale), ffn) for att, num, den, scale, ffn in values_L51D)


def _stacked(arrays, expected: str, ndim: int) -> np.ndarray:
    try:
        arrays = [np.asarray(x) for x in arrays]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state is not {expected}: {error}") from None
    shapes = sorted({x.shape for x in arrays})
    if len(shapes) != 1 or len(shapes[0]) != ndim or 0 in shapes[0]:
        raise ValueError(f"the state has shapes {', '.join(map(str, shapes)) or 'none'}, expected {expected}")
    values = formats.copied("the state", np.stack(arrays), np.empty((len(arrays), *arrays[0].shape), np.float32))
    if not np.isfinite(values).all():
        bad = next(i for i, x in enumerate(values) if not np.isfinite(x).all())
        raise ValueError(f"array {bad} of the state holds values that are not finite")
    return values


def _with_empty_scale(values_ND: np.ndarray, empty_scale: float) -> np.ndarray:
    values_ND = values_ND.copy()
    num_LD, den_LD, scale_LD = values_ND[1::5], values_ND[2::5], values_ND[3::5]
    scale_LD[(num_LD == 0) & (den_LD == 0)] = empty_scale
    return values_ND
