"""rwkv.cpp's own model files (ggmf, versions 100 and 101), float32 and float16, read and written.

Six int32: magic, version, V, D, L, data type. Then for each tensor three int32 (number of dimensions, length of
the name, data type), the dimensions in reverse, the name and the numbers; little-endian, nothing aligned. Names are
the official ones. `time_*` are vectors [D], always float32, and `time_decay` is stored as -exp(time_decay).

That runtime quantises such a file further for phones and edge devices. What the decay goes through: log(exp(x)),
computed in float64, is x again bit for bit where |x| >= 1, and within 6e-8 of it elsewhere; all else is exact.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rwkv_jax import files
from rwkv_jax.interop import formats
from rwkv_jax.interop.official import layer_count, version_of, without_prefix
from rwkv_jax.models import KINDS

_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_QUANTISED = {2: "Q4_0", 3: "Q4_1", 4: "Q4_1_O", 5: "Q4_2", 6: "Q4_3", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_MAGIC = int.from_bytes(formats.RWKV_CPP, "little")


def read(path) -> dict[str, np.ndarray]:
    """The tensors of a file by official name, in official shapes: read-only views of the memory-mapped file.

    Raises:
      ValueError: the file is cut short, damaged, quantised, or holds weights of a later version.
    """
    with formats.naming(path):
        return _read(formats.view(path))


def _read(buffer) -> dict[str, np.ndarray]:
    size = len(buffer)
    if size < 24:
        raise ValueError(f"truncated: {size} bytes, no rwkv.cpp header")
    _, version, V, D, L, mostly = struct.unpack("<6i", buffer[:24])
    if version not in (100, 101):
        raise ValueError(f"rwkv.cpp file version {version}, expected 100 or 101")
    _check_dtype("it", mostly)
    tensors, position = {}, 24
    while position < size:
        name, dtype, shape, position = _header(buffer, position)
        if name in tensors:
            raise ValueError(f"damaged: {name!r} occurs twice")
        end = position + math.prod(shape) * dtype.itemsize
        if end > size:
            raise ValueError(f"truncated: {name!r} ends at byte {end:,} of {size:,}")
        tensors[name] = np.ndarray(shape, dtype, buffer, position)
        position = end
    tensors = without_prefix(tensors)
    if "emb.weight" not in tensors:
        raise ValueError(f"no RWKV weights: 'emb.weight' is not among the {len(tensors)} keys")
    if "rwkv.cpp" not in (kind := KINDS[version_of(tensors)]).formats:
        raise ValueError(f"{kind.released} weights; of rwkv.cpp's files only RWKV-4 is supported")
    found = (*tensors["emb.weight"].shape, layer_count(tensors))
    if found != (V, D, L):
        raise ValueError(f"damaged: its header says V, D, L = {(V, D, L)}, its tensors {found}")
    return {name: _official(name, x) for name, x in tensors.items()}


def _check_dtype(what: str, dtype: int) -> None:
    if dtype in _QUANTISED:
        raise ValueError(f"{what} is quantised ({_QUANTISED[dtype]}); convert from the FP16 or FP32 file")
    if dtype not in _DTYPES:
        raise ValueError(f"damaged: {what} has data type {dtype}, expected 0 (FP32) or 1 (FP16)")


def _header(buffer, position: int) -> tuple[str, np.dtype, tuple[int, ...], int]:
    """Name, dtype and shape of the tensor whose header starts at `position`, and where its numbers start."""
    try:
        ndim, length, dtype = struct.unpack_from("<3i", buffer, position)
        if not 1 <= ndim <= 3 or not 0 < length <= 1024:
            raise ValueError(f"damaged: {ndim} dimensions and a name of {length} bytes at byte {position:,}")
        shape = struct.unpack_from(f"<{ndim}i", buffer, position + 12)
        (name,) = struct.unpack_from(f"{length}s", buffer, position + 12 + 4 * ndim)
        name = name.decode()
    except struct.error as error:
        raise ValueError(f"truncated: a tensor's header at byte {position:,} is cut short") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"damaged: the name of the tensor at byte {position:,} is no text") from error
    _check_dtype(repr(name), dtype)
    if min(shape) < 1:
        raise ValueError(f"damaged: {name!r} has shape {shape[::-1]}")
    return name, _DTYPES[dtype], shape[::-1], position + 12 + 4 * ndim + length


def _official(name: str, x: np.ndarray) -> np.ndarray:
    if ".time_mix_" in name:
        return x.reshape(1, 1, -1)
    if not name.endswith(".time_decay"):
        return x
    if not (x < 0).all():
        raise ValueError(f"{name!r} is not negative everywhere; rwkv.cpp stores it as -exp(time_decay)")
    return np.log(-x.astype(np.float64)).astype(np.float32)


def write(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write official RWKV-4 tensors: matrices as float16 if `head.weight` is float16, everything else as float32.

    Values may be NumPy or JAX arrays; one is copied at a time. The file appears whole or not at all.

    Raises:
      FileNotFoundError: the folder of `path` does not exist.
      ValueError: a number is beyond the range of its dtype there.
    """
    half = tensors["head.weight"].dtype == np.float16
    with files.written(path) as file:
        file.write(struct.pack("<6i", _MAGIC, 101, *tensors["emb.weight"].shape, layer_count(tensors), int(half)))
        for name, x in tqdm(tensors.items(), Path(path).name, unit="tensor", disable=None):
            x = np.asarray(x)
            if ".time_" in name:
                x = x.reshape(-1)
            if name.endswith(".time_decay"):
                x = -np.exp(x.astype(np.float64))
            dtype = int(half and x.ndim > 1)
            with formats.naming(path):
                stored = formats.copied(name, x, np.empty(x.shape, _DTYPES[dtype]))
                if name.endswith(".time_decay") and not (stored < 0).all():
                    raise ValueError(f"{name} is too slow: -exp(time_decay), as rwkv.cpp stores it, becomes 0")
            file.write(struct.pack("<3i", x.ndim, len(name.encode()), dtype))
            file.write(struct.pack(f"<{x.ndim}i", *x.shape[::-1]))
            file.write(name.encode())
            file.write(formats.content(stored))
