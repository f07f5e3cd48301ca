"""Detection of a weight file's format, and helpers that the formats share."""

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PTH, SAFETENSORS, RWKV_CPP = b"PK\x03\x04", b"{", b"fmgg"


# Beginnings of what is often found in place of weights.
_FOREIGN = {
    b"<": "a web page, not weights; download the file itself",
    b"version https://git-lfs": "a Git LFS pointer, not weights; fetch the file itself",
    b"\x80": "torch's old format, not a zip; re-save it in torch: save(load(path), path)",
}


def format_of(path) -> str:
    """ "pth", "safetensors" or "rwkv.cpp", by the first bytes of the file.

    Raises:
      ValueError: they are those of another format, or the file is empty.
    """
    with Path(path).open("rb") as file:
        head = file.read(64)
    if head.startswith(PTH):
        return "pth"
    if head.startswith(RWKV_CPP):
        return "rwkv.cpp"
    if head[8:9] == SAFETENSORS:  # after the header's length, which may look like any text
        return "safetensors"
    if not head.strip():
        raise ValueError(f"{path}: empty file; expected weights")
    for beginning, found in _FOREIGN.items():
        if head.lstrip().startswith(beginning):
            raise ValueError(f"{path}: {found}")
    raise ValueError(f"{path}: no weights; expected a .pth, .safetensors or rwkv.cpp file")


@contextlib.contextmanager
def naming(source):
    """Begin the message of a ValueError that is raised inside with `source`, such as a path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def view(path) -> mmap.mmap:
    """Content of a file that is not empty, memory-mapped."""
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def content(array: Any) -> np.ndarray:
    """Bytes of a NumPy or JAX array in C order, uint8 [n]; a copy only where the array has another layout."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def can_be_a_shape(sizes: Sequence[int]) -> bool:
    """Return whether NumPy can express the shape; even an array of no elements may have too large a size."""
    return len(sizes) <= 8 and math.prod(max(n, 1) for n in sizes) < 2**59
