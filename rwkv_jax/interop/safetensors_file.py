"""`.safetensors` files, read and written by their own definition, so that a tensor read is a view of the file.

Eight bytes: the length of the header. The header: JSON, for each tensor `{"dtype", "shape", "data_offsets"}`, and
free strings under `__metadata__`. Then the numbers, without gaps.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rwkv_jax import files
from rwkv_jax.interop import formats

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; what the reference implementation accepts


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Each array is a read-only view of the memory-mapped file: nothing is read before it is used.

    Raises:
      ValueError: the file is cut short, or its header is none or does not fit its content.
    """
    size = Path(path).stat().st_size
    if size < 8:
        raise ValueError(f"{path}: truncated: {size} bytes, no .safetensors header")
    buffer = formats.view(path)
    length = int.from_bytes(buffer[:8], "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"{path}: truncated or damaged: a header of {length:,} bytes in a file of {size:,}")
    try:
        header = json.loads(buffer[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: damaged: its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: damaged: its metadata are not strings by name")
    start, held = 8 + length, size - 8 - length
    tensors = {name: _view(path, buffer, start, held, name, entry) for name, entry in header.items()}
    used = sum(x.nbytes for x in tensors.values())
    if used != held:
        raise ValueError(f"{path}: damaged: tensors of {used:,} bytes together in {held:,} bytes of numbers")
    return tensors, metadata


def _unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _view(path, buffer, start: int, held: int, name: str, entry) -> np.ndarray:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [begin, end, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {name!r} has no dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: {name!r} has dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in sizes)
    if not whole or not formats.can_be_a_shape(shape):
        raise ValueError(f"{path}: damaged: {name!r} has shape {shape!r:.99} and offsets {[begin, end]!r:.99}")
    needed = math.prod(shape) * jnp.dtype(_DTYPES[dtype]).itemsize
    if end - begin != needed or end > held:
        raise ValueError(
            f"{path}: truncated or damaged: {name!r} takes {needed:,} bytes, given as {begin:,} to {end:,} of {held:,}"
        )
    if needed == 0:
        return np.empty(shape, jnp.dtype(_DTYPES[dtype]))
    return np.ndarray(shape, jnp.dtype(_DTYPES[dtype]), buffer, start + begin)


def write(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `tensors` with `metadata`; values may be NumPy or JAX arrays, and one is copied at a time.

    The file appears whole or not at all.

    Raises:
      ValueError: a tensor has a dtype that the format does not know.
      FileNotFoundError: the folder of `path` does not exist.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    # Wide dtypes first, as the reference does it: then every tensor starts at a multiple of its own width.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        x = tensors[name]
        if x.dtype.name not in _NAMES:
            raise ValueError(f"{name!r} has dtype {x.dtype}; a .safetensors holds {', '.join(_NAMES)}")
        begin, end = end, end + x.size * x.dtype.itemsize
        header[name] = {"dtype": _NAMES[x.dtype.name], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.written(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in tqdm(order, Path(path).name, unit="tensor", disable=None):
            file.write(formats.content(tensors[name]))
