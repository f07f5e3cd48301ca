"""torch's `.pth` files, read and written without torch.

A `.pth` is a zip of uncompressed records: `data.pkl`, a pickle that names the tensors, and a `data/<key>` for
each storage, the numbers. A tensor is a strided view of a storage, so reading one is a view of the file.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rwkv_jax import files
from rwkv_jax.interop import formats

_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_STORAGES = {dtype: storage for storage, dtype in _DTYPES.items()}
_ALIGNMENT = 64  # bytes; where torch.save itself lets a storage start


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _OrderedDict(dict):
    def __setstate__(self, module_versions):
        """Drop attributes: torch stores the modules' versions here, and a forged file could store an `items`."""


def _rebuild_tensor(storage, offset, shape, strides, *_requires_grad_hooks_metadata):
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_requires_grad_hooks):
    return tensor


# Storage types stay strings: a pickle can modify a class that it has a reference to, but not a string.
_GLOBALS = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", storage): dtype for storage, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler of `_GLOBALS`, numbers, strings and containers; it imports and calls nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _GLOBALS:
            raise ValueError(f"it asks for {f'{module}.{name}'!r}, which no state dict needs; refused")
        return _GLOBALS[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _device, size = pid
        if kind != "storage" or dtype not in _STORAGES or not isinstance(key, str) or not _is_size(size):
            raise ValueError(f"expected a reference to a storage, found {pid!r}")
        return _Storage(dtype, key, size)


def read(path) -> dict[str, np.ndarray]:
    """Return the tensors of a `.pth` state dict, by name.

    Each array is a read-only view of the memory-mapped file, with the file's dtype (bfloat16 included), shape and
    strides: nothing is read before it is used, so a 28 GB file needs no memory of its own.

    Raises:
      ValueError: the file is damaged, compressed or big-endian, does not hold a flat dict of tensors, or its pickle
        asks for anything that such a dict does not need.
    """
    with formats.naming(path):
        spans = _records(path)
        buffer = formats.view(path)
        root = next((name.removesuffix("data.pkl") for name in spans if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("a zip file without data.pkl; expected a .pth that torch.save wrote")
        record = lambda name: buffer[slice(*spans[root + name])]
        if root + "byteorder" in spans and record("byteorder") != b"little":
            raise ValueError(f"its byteorder is {record('byteorder')!r}; expected b'little'")
        state = _state_dict(record("data.pkl"))
        return {
            name: _view(buffer, spans.get(f"{root}data/{tensor.storage.key}"), name, tensor)
            for name, tensor in state.items()
        }


def _state_dict(program: bytes) -> dict[str, _Tensor]:
    """Return the tensors that a pickle names."""
    # A damaged pickle can raise nearly anything; all are reported alike.
    try:
        _check_memo(program)
        state = _Unpickler(io.BytesIO(program)).load()
    except Exception as error:
        raise ValueError(f"data.pkl is not the pickle of a state dict: {files.one_line(error)}") from error
    kind = lambda value: type(value).__name__.strip("_")
    if not isinstance(state, dict):
        raise ValueError(f"holds a {kind(state)}; expected a dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"key {name!r} is not a string; expected a dict of tensors by name")
        if not isinstance(value, _Tensor):
            raise ValueError(f"{name!r} holds a {kind(value)}; expected a flat dict of tensors only")
    return state


def _check_memo(program: bytes) -> None:
    """Refuse a pickle with a memo index beyond its own length: CPython allocates a table of that size."""
    for operation, number, _ in pickletools.genops(program):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > len(program):
            raise ValueError(f"its memo index {number:,} exceeds its {len(program):,} bytes")


def _records(path) -> dict[str, tuple[int, int]]:
    """Return the first and last-plus-one byte of each stored record within the file, by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"truncated or damaged zip file ({error}); download it again") from error
    buffer = formats.view(path)
    return {info.filename: _span(buffer, info) for info in records}


def _span(buffer, info: zipfile.ZipInfo) -> tuple[int, int]:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"record {info.filename!r} is compressed; torch.save stores it uncompressed")
    header = buffer[info.header_offset : info.header_offset + 30]
    if len(header) < 30 or not header.startswith(formats.PTH):
        raise ValueError(f"damaged zip file: no record where {info.filename!r} should be")
    # Lengths of name and padding are those of the local header; the central directory's may differ.
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.file_size > len(buffer):
        raise ValueError(f"truncated: record {info.filename!r} ends past the end of the file")
    return start, start + info.file_size


def _view(buffer, span, name, tensor: _Tensor) -> np.ndarray:
    storage, offset, shape, strides = tensor
    sizes_valid = len(shape) == len(strides) and all(_is_size(n) for n in (offset, *shape, *strides))
    if not isinstance(storage, _Storage) or not sizes_valid or not formats.can_be_a_shape(shape):
        raise ValueError(f"{name!r} is not a strided view of a storage: {tuple(tensor)}")
    if span is None:
        raise ValueError(f"{name!r} needs record 'data/{storage.key}', which the file lacks")
    dtype = jnp.dtype(storage.dtype)
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    used = 1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    held = min(storage.size, (span[1] - span[0]) // dtype.itemsize)
    if used > held:
        raise ValueError(f"{name!r} needs {used} elements of storage {storage.key!r}; it has {held}")
    byte_strides = [s * dtype.itemsize for s in strides]
    return np.ndarray(shape, dtype, buffer, span[0] + offset * dtype.itemsize, byte_strides)


def _is_size(n) -> bool:
    return isinstance(n, int) and n >= 0


def write(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` so that `torch.load(path, weights_only=True)` returns them, bit for bit and in order.

    Values may be NumPy or JAX arrays; one is copied at a time. The file is written atomically.

    Raises:
      ValueError: a tensor has a dtype for which torch has no storage.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    with files.written(path) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file.tell(), "data.pkl", _pickle(tensors))
        _add(archive, file.tell(), "byteorder", b"little")
        for key, value in enumerate(tqdm(tensors.values(), path.name, unit="tensor", disable=None)):
            _add(archive, file.tell(), f"data/{key}", formats.content(value))
        _add(archive, file.tell(), "version", b"3\n")


def _add(archive: zipfile.ZipFile, position: int, name: str, content) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    # Before the content: 30 bytes of header, the name, 20 of 64-bit sizes, and the padding field with its own 4.
    padding = -(position + 30 + len(info.filename) + 20 + 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(content)


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle, in protocol 2, of an OrderedDict of contiguous torch tensors."""
    text = lambda s: b"X" + struct.pack("<I", len(s.encode())) + s.encode()
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    out = [b"\x80\x02", ordered_dict, b"("]
    for key, (name, array) in enumerate(tensors.items()):
        if str(array.dtype) not in _STORAGES:
            raise ValueError(f"{name!r} has dtype {array.dtype}; a .pth holds {', '.join(_STORAGES)}")
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage = f"ctorch\n{_STORAGES[str(array.dtype)]}\n".encode()
        out += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n("]
        out += [b"(", text("storage"), storage, text(str(key)), text("cpu"), _int(array.size), b"tQ"]
        out += [_int(0), b"(", *map(_int, array.shape), b"t(", *map(_int, strides), b"t"]
        out += [b"\x89", ordered_dict, b"tR"]
    return b"".join([*out, b"u."])


def _int(n: int) -> bytes:
    if n < 2**31:
        return b"J" + struct.pack("<i", n)
    return b"\x8a\x08" + struct.pack("<q", n)
