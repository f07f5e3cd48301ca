"""Megatron token files, `PREFIX.bin` and `PREFIX.idx`, the format of the released models' data.

    PREFIX.bin   tokens, little-endian integers, documents one after another, each followed by token 0
    PREFIX.idx   b"MMIDIDX\\0\\0", uint64 version 1, uint8 code of the type of tokens, uint64 number of sequences S,
                 uint64 D, then int32 length of each sequence [S], int64 its first byte [S], and int64 document
                 index [D]: the first sequence of each document, then S

Format: EleutherAI/gpt-neox, megatron/data/indexed_dataset.py; BlinkDL/RWKV-LM, RWKV-v5/make_data.py writes it.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rwkv_jax import files

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point


def prefix_of(path: Path) -> Path | None:
    """Return PREFIX for the prefix or either file of a pair; None if there is no such pair."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    files = [with_ending(prefix, ending) for ending in (".bin", ".idx")]
    return prefix if files[1].is_file() and (files[0].is_file() or path in files) else None


def with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def read(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [N], memory-mapped, and where documents begin, [documents] int64.

    Raises:
        FileNotFoundError: no `PREFIX.bin`.
        ValueError: a file is truncated, or the two do not match.
    """
    index, data = with_ending(prefix, ".idx"), with_ending(prefix, ".bin")
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise ValueError(f"{index} is not the index of a Megatron token file: it does not begin with MMIDIDX")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{index}: version {version}, type {code}: expected version 1 and a type of integers")
    expected, found = _HEADER.size + 12 * num_sequences + 8 * num_bounds, index.stat().st_size
    if found != expected:
        raise ValueError(f"{index} has {found} bytes, expected {expected} for its {num_sequences} sequences")
    if not num_sequences:
        raise ValueError(f"{index} holds no documents")
    dtype = np.dtype(_DTYPES[code])
    raw = np.memmap(index, mode="r", offset=_HEADER.size)
    sizes = raw[: 4 * num_sequences].view("<i4")
    pointers = raw[4 * num_sequences : 12 * num_sequences].view("<i8")
    bounds = raw[12 * num_sequences :].view("<i8")
    ends = np.cumsum(sizes, dtype=np.int64)
    if sizes.min() < 0 or pointers[0] or not np.array_equal(pointers[1:], ends[:-1] * dtype.itemsize):
        raise ValueError(f"{index} is damaged: its sequences are not contiguous")
    good = num_bounds >= 2 and bounds[0] == 0 and bounds[-1] == num_sequences
    if not (good and np.all(bounds[1:] >= bounds[:-1])):
        raise ValueError(f"{index} is damaged: its document index does not ascend from 0 to {num_sequences}")
    expected, found = int(ends[-1]) * dtype.itemsize, data.stat().st_size
    if found != expected:
        raise ValueError(f"{data} has {found} bytes, expected {expected} by its index")
    if not found:
        raise ValueError(f"{data} is empty")
    edges = np.concatenate([[0], ends])[bounds]  # where documents begin, and the end
    return np.memmap(data, dtype, mode="r"), edges[:-1][edges[:-1] < edges[1:]]


def write(prefix: Path, documents: Iterable[np.ndarray], dtype) -> int:
    """Write documents, arrays of tokens that each end with token 0; return their number.

    The pair appears once it is complete. Each document is one sequence, as in the files of the released converters.

    Args:
        dtype: type of the tokens: uint8, int8, int16, int32, int64 or uint16.

    Raises:
        FileNotFoundError: the folder of `prefix` does not exist.
        ValueError: no documents.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    code = {np.dtype(name): code for code, name in _DTYPES.items()}[dtype]
    sizes = []
    with (
        files.written(with_ending(prefix, ".idx")) as index,
        files.written(with_ending(prefix, ".bin")) as data,
    ):
        for tokens in documents:
            if len(tokens) >= 1 << 31:
                raise ValueError(f"a document has {len(tokens):,} tokens, and the format holds fewer than 2^31 of one")
            data.write(tokens.astype(dtype, copy=False).data)
            sizes.append(len(tokens))
        if not sizes:
            raise ValueError(f"no documents to write to {prefix}")
        lengths = np.array(sizes, "<i4")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
        index.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        for array in (lengths, pointers, np.arange(len(sizes) + 1, dtype="<i8")):
            index.write(array.data)
    return len(sizes)
