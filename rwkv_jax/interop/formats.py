"""Detection of a weight file's format, and helpers that the formats share."""

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

PTH, SAFETENSORS, RWKV_CPP = b"PK\x03\x04", b"{", b"fmgg"


# First bytes of files that are often mistaken for weights.
_FOREIGN = {
    b"<": "a web page, not weights; download the file itself",
    b"version https://git-lfs": "a Git LFS pointer, not weights; fetch the file itself",
    b"\x80": "torch's old format, not a zip; re-save it in torch: save(load(path), path)",
}


def format_of(path) -> str:
    """Return "pth", "safetensors" or "rwkv.cpp", detected from the first bytes of the file.

    Raises:
      ValueError: they are those of another format, or the file is empty, or a pipe.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: a pipe or device, and weights are mapped into memory; expected a file")
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
    raise ValueError(f"{path}: not weights; expected a .pth, .safetensors or rwkv.cpp file")


@contextlib.contextmanager
def naming(source):
    """Begin the message of a ValueError that is raised inside with `source`, such as a path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def view(path) -> mmap.mmap:
    """Memory-map a file that is not empty."""
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def content(array: Any) -> np.ndarray:
    """Return the bytes of a NumPy or JAX array in C order, uint8 [n]; a copy only if its layout differs."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def copied(name: str, x: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Copy a tensor to an array of its shape and of any dtype, and return that array. Underflow becomes 0.

    Raises:
      ValueError: a finite number overflows the dtype.
    """
    with np.errstate(over="ignore"):
        np.copyto(to, x, casting="unsafe")
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if floating and jnp.finfo(to.dtype).max < jnp.finfo(x.dtype).max and not np.isfinite(to).all():
        lost = x[np.isfinite(x) & ~np.isfinite(to)]
        if lost.size:
            largest = float(jnp.finfo(to.dtype).max)
            raise ValueError(f"{name} holds {float(lost[0]):g}, and the largest {to.dtype.name} is {largest:g}")
    return to


def can_be_a_shape(sizes: Sequence[int]) -> bool:
    """Return whether NumPy can express the shape; even an array of no elements may have too large a size."""
    return len(sizes) <= 8 and math.prod(max(n, 1) for n in sizes) < 2**59
