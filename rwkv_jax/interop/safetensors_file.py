"""`.safetensors` files: the `safetensors` library reads the header, and a tensor is a view of the file.

The library itself returns copies of whole tensors, where a host may need only a part of each. It writes all tensors at
once, and contiguous, which for transposed views takes a second copy of the model (see `write`).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from tqdm import tqdm

from rwkv_jax import files
from rwkv_jax.interop import formats

# The format's names -> NumPy's and JAX's
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata.

    Each array is a read-only view of the memory-mapped file: nothing is read before it is used.

    Raises:
      ValueError: the file is truncated or damaged, or a tensor has a dtype or shape that NumPy lacks.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged: {files.one_line(error)}") from error
    buffer = formats.view(path)
    tensors, position = {}, 8 + int.from_bytes(buffer[:8], "little")  # after the header and its length
    for name, part in parts.items():  # in the order of their data, where the library allows no gaps
        dtype, shape = part.get_dtype(), part.get_shape()
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: {name!r:.99} has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        if not formats.can_be_a_shape(shape):
            raise ValueError(f"{path}: damaged: {name!r:.99} has shape {shape!r:.99}")
        tensors[name] = np.ndarray(shape, jnp.dtype(_DTYPES[dtype]), buffer, position)
        position += tensors[name].nbytes
    return tensors, metadata


def write(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `tensors` with `metadata`; values may be NumPy or JAX arrays. The file is written atomically.

    One tensor is copied at a time: writing 512 MiB of transposed matrices takes 16 MiB of memory for copies.
    safetensors' own `save_file` takes 496 MiB more.

    Raises:
      ValueError: a tensor has a dtype that the format does not know.
      FileNotFoundError: the folder of `path` does not exist.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    # Wide dtypes first, as in the library: then every tensor starts at a multiple of its own width.
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
