"""rwkv.cpp's own model files (ggmf, versions 100 and 101) of RWKV-4, 5.2, 6 and 7, FP32 and FP16, read and written.

Six int32: magic, version, V, D, L, data type. Then for each tensor three int32 (number of dimensions, length of
the name, data type), the dimensions in reverse, the name and the numbers; little-endian, nothing aligned. Names are
the official ones, and matrices `.weight` as official. The rest, in that runtime's forms:

    time_mix_*, time_maa_*, time_first            [D]
    time_decay    RWKV-4: -exp(time_decay) [D]    5.2: exp(-exp(time_decay)) [H, K, 1]    6: as it is, [H, K, 1]
    time_faaaa    [H, K, 1]
    low-rank maps of RWKV-6 and 7                 each matrix transposed
    x_r, x_w, x_k, x_v, x_a, x_g of RWKV-7        one x_rwkvag [6, 1, D]

In an FP16 file these are float32, except the low-rank maps of RWKV-7. All but the decay is exact. RWKV-4: log(exp(x)),
computed in float64, equals x bit for bit where |x| >= 1, and within 6e-8 elsewhere. RWKV-5.2: the decay itself is
rounded to float32, where the slowest lose digits: time_decay is restored within 8e-8 exp(-time_decay), bit for bit
from 1 to 4.4. In a file that is read and written again, decays from 0.2 to 1 are equal, others within 3e-8.

The runtime computes RWKV-5.2 with 1e-5 for the epsilon of the heads' norm, where the released code has 64e-5. A file
is read as a model with the epsilon of the runtime. A model with the released one is written with att.receptance / 8,
as norm(y / 8) with 1e-5 is norm(y) with 64e-5 bit for bit: the runtime then computes the released model, which it does
not for files that rwkv.cpp's own converter makes of released weights.

The runtime quantises such files further for phones and edge devices.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rwkv_jax import files
from rwkv_jax.interop import formats
from rwkv_jax.interop.official import VECTORS, layer_count, version_of, without_prefix
from rwkv_jax.models import KINDS
from rwkv_jax.models.block import RELEASED_EPSILON

_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_QUANTISED = {2: "Q4_0", 3: "Q4_1", 4: "Q4_1_O", 5: "Q4_2", 6: "Q4_3", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_MAGIC = int.from_bytes(formats.RWKV_CPP, "little")
_TRANSPOSED = re.compile(r".*\.att\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])$")
_MIXES = "rwkvag"  # rows of x_rwkvag


def head_norm_epsilon(tensors: Mapping[str, np.ndarray]) -> float:
    """Return the epsilon of the heads' norm with which the runtime computes the model of official tensors."""
    return 1e-5 if version_of(tensors) == "rwkv5" else RELEASED_EPSILON


def read(path) -> dict[str, np.ndarray]:
    """Return the tensors of a file by official name and shape: read-only views of the memory-mapped file.

    Raises:
      ValueError: the file is truncated, damaged, quantised, or holds weights of RWKV-5.0 or 5.1.
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
        raise ValueError(f"not RWKV weights: 'emb.weight' is not among the {len(tensors)} keys")
    tensors = {
        name: _by_heads(x) if name.endswith((".time_decay", ".time_faaaa")) else x for name, x in tensors.items()
    }
    kind = version_of(tensors)
    found = (*tensors["emb.weight"].shape, layer_count(tensors))
    if found != (V, D, L):
        raise ValueError(f"damaged: its header says V, D, L = {(V, D, L)}, its tensors {found}")
    return dict(pair for name, x in tensors.items() for pair in _official(name, x, kind))


def _check_dtype(what: str, dtype: int) -> None:
    if dtype in _QUANTISED:
        raise ValueError(f"{what} is quantised ({_QUANTISED[dtype]}); convert from the FP16 or FP32 file")
    if dtype not in _DTYPES:
        raise ValueError(f"damaged: {what} has data type {dtype}, expected 0 (FP32) or 1 (FP16)")


def _header(buffer, position: int) -> tuple[str, np.dtype, tuple[int, ...], int]:
    """Return name, dtype and shape of the tensor whose header starts at `position`, and where its numbers start."""
    try:
        ndim, length, dtype = struct.unpack_from("<3i", buffer, position)
        if not 1 <= ndim <= 3 or not 0 < length <= 1024:
            raise ValueError(f"damaged: {ndim} dimensions and a name of {length} bytes at byte {position:,}")
        shape = struct.unpack_from(f"<{ndim}i", buffer, position + 12)
        (name,) = struct.unpack_from(f"{length}s", buffer, position + 12 + 4 * ndim)
        name = name.decode()
    except struct.error as error:
        raise ValueError(f"truncated: a tensor's header at byte {position:,} is incomplete") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"damaged: the name of the tensor at byte {position:,} is not UTF-8") from error
    _check_dtype(repr(name), dtype)
    if min(shape) < 1:
        raise ValueError(f"damaged: {name!r} has shape {shape[::-1]}")
    return name, _DTYPES[dtype], shape[::-1], position + 12 + 4 * ndim + length


def _by_heads(x: np.ndarray) -> np.ndarray:
    """Reshape [H, K, 1], or the [K, 1] that rwkv.cpp's converter writes for one head, to [H, K]."""
    return x if x.ndim == 1 else x.reshape(len(x) if x.ndim == 3 else 1, -1)


def _official(name: str, x: np.ndarray, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the official names and tensors of a tensor in a file."""
    if name.endswith(".x_rwkvag"):
        if len(x) != len(_MIXES):
            raise ValueError(f"damaged: {name!r} has shape {x.shape}, expected {len(_MIXES)} rows")
        yield from (
            (name.replace("x_rwkvag", f"x_{c}"), row.reshape(1, 1, -1)) for c, row in zip(_MIXES, x, strict=True)
        )
    elif name.endswith(".time_decay"):
        yield name, _time_decay(name, x, kind)
    elif VECTORS.match(name):
        yield name, x.reshape(1, 1, -1)
    elif _TRANSPOSED.match(name) and x.ndim > 1:
        yield name, x.swapaxes(-2, -1)
    else:
        yield name, x


def _time_decay(name: str, stored: np.ndarray, kind: str) -> np.ndarray:
    if kind == "rwkv6":
        return stored.reshape(1, 1, -1)
    wide = stored.astype(np.float64)
    if kind == "rwkv4":
        if not (wide < 0).all():
            raise ValueError(f"{name!r} is not negative everywhere; rwkv.cpp stores it as -exp(time_decay)")
        return np.log(-wide).astype(np.float32)
    if not ((wide >= 0) & (wide <= 1)).all():
        raise ValueError(f"{name!r} is not from 0 to 1 everywhere; rwkv.cpp stores it as exp(-exp(time_decay))")
    # 0 and 1, whose time_decay is infinite, become the nearest decays that float32 rounds to them.
    return np.log(-np.log(np.clip(wide, np.exp(-104), 1 - 2.0**-26))).astype(np.float32)


def write(path, tensors: Mapping[str, np.ndarray], epsilon: float = RELEASED_EPSILON) -> None:
    """Write official tensors: matrices as float16 if `head.weight` is float16, everything else as float32.

    Values may be NumPy or JAX arrays; one is copied at a time. The file is written atomically.

    Args:
      epsilon: of the heads' norm of their model.

    Raises:
      FileNotFoundError: the folder of `path` does not exist.
      ValueError: a number is beyond the range of its dtype there, or the runtime has another epsilon.
    """
    kind, half = version_of(tensors), tensors["head.weight"].dtype == np.float16
    divides = (kind, epsilon) == ("rwkv5", RELEASED_EPSILON)
    if not divides and epsilon != (its := head_norm_epsilon(tensors)):
        raise ValueError(
            f"{path}: rwkv.cpp computes {KINDS[kind].released} with head_norm_epsilon={its}, "
            f"and this model has {epsilon}; use .safetensors"
        )
    with files.written(path) as file:
        file.write(struct.pack("<6i", _MAGIC, 101, *tensors["emb.weight"].shape, layer_count(tensors), int(half)))
        for name in tqdm(tensors, Path(path).name, unit="tensor", disable=None):
            x = _stored(name, tensors, kind)
            if x is None:
                continue
            narrow = half and x.ndim == 2 and ".time_" not in name and not name.endswith(".r_k")
            if divides and name.endswith(".att.receptance.weight"):
                x, narrow = x.astype(np.float32) / 8, False  # float16 may lose digits
            with formats.naming(path):
                stored = formats.copied(name, x, np.empty(x.shape, _DTYPES[narrow]))
                if kind == "rwkv4" and name.endswith(".time_decay") and not (stored < 0).all():
                    raise ValueError(f"{name} is too slow: -exp(time_decay), as rwkv.cpp stores it, becomes 0")
            name = name.replace(".att.x_r", ".att.x_rwkvag")
            file.write(struct.pack("<3i", x.ndim, len(name.encode()), int(narrow)))
            file.write(struct.pack(f"<{x.ndim}i", *x.shape[::-1]))
            file.write(name.encode())
            file.write(formats.content(stored))


def _stored(name: str, tensors: Mapping[str, np.ndarray], kind: str) -> np.ndarray | None:
    """Return an official tensor as the runtime stores it; x_r gives all six of x_rwkvag, the other five None."""
    x = np.asarray(tensors[name])
    if name.endswith(".time_decay"):
        wide = x.astype(np.float64)
        with np.errstate(over="ignore"):
            if kind == "rwkv4":
                return -np.exp(wide)
            if kind == "rwkv5":
                return np.exp(-np.exp(wide))[..., None]
        return x.reshape(*tensors[name.replace("time_decay", "time_faaaa")].shape, 1)
    if name.endswith(".time_faaaa"):
        return x[..., None]
    if name.endswith(".att.x_r"):
        return np.stack([np.asarray(tensors[f"{name[:-1]}{c}"])[0] for c in _MIXES])
    if ".att.x_" in name:
        return None
    if ".time_" in name and VECTORS.match(name):
        return x.reshape(-1)
    return x.swapaxes(-2, -1) if _TRANSPOSED.match(name) else x
