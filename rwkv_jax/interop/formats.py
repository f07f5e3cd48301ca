"""Detect the format of a file of weights, and what the formats share: views of a file, the bytes of an array."""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PTH, SAFETENSORS, RWKV_CPP = b"PK\x03\x04", b"{", b"fmgg"


def format_of(path) -> str:
    """ "pth", "safetensors" or "rwkv.cpp": what the first bytes of a file say, whatever it is called.

    Raises:
      ValueError: they say something else, or nothing.
    """
    with Path(path).open("rb") as file:
        head = file.read(64)
    if head.startswith(PTH):
        return "pth"
    if head.startswith(RWKV_CPP):
        return "rwkv.cpp"
    if head[8:9] == SAFETENSORS:  # after the header's length, which may look like any text
        return "safetensors"
    refuse_other_things(path, head)
    raise ValueError(f"{path}: no weights; expected a .pth, .safetensors or rwkv.cpp file")


def refuse_other_things(path, head: bytes) -> None:
    """Name what is often found in place of weights, from the first bytes of a file."""
    text = head.lstrip()
    if not text:
        raise ValueError(f"{path}: empty file; expected weights")
    if text.startswith(b"<"):
        raise ValueError(f"{path}: a web page, not weights; download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not weights; fetch the file itself")
    if text.startswith(b"\x80"):
        raise ValueError(f"{path}: torch's old format, not a zip; re-save it in torch: save(load(path), path)")


def view(path) -> mmap.mmap:
    """The content of a file that is not empty, memory-mapped: a part is read when it is used."""
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def content(array: Any) -> np.ndarray:
    """The bytes of one NumPy or JAX array in C order, uint8 [n]; a copy only where it is not laid out so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def can_be_a_shape(sizes: Sequence[int]) -> bool:
    """True where NumPy can express it; even an array of no elements may have too large a size."""
    return len(sizes) <= 8 and math.prod(max(n, 1) for n in sizes) < 2**59
