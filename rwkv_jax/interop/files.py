"""What every format needs of the file system: what a file is, a view of it, and a new one that appears whole."""

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PTH, SAFETENSORS, RWKV_CPP = b"PK\x03\x04", b"{", b"fmgg"


def kind(path) -> str:
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


@contextlib.contextmanager
def written(path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, synchronised; after an error `path` is as it was.

    Raises:
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def written_folder(path) -> Iterator[Path]:
    """A folder to fill that becomes `path` at the end, in place of what is there; after an error that is as it was."""
    path = Path(path)
    beside = _beside(path)
    old = beside.with_suffix(".old")
    try:
        beside.mkdir()
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; cannot write {path.name} there")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def content(array: Any) -> np.ndarray:
    """The bytes of one NumPy or JAX array in C order, uint8 [n]; a copy only where it is not laid out so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def read_json(path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: it holds anything else.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def can_be_a_shape(sizes: Sequence[int]) -> bool:
    """Whether NumPy can express it; even an array of no elements may have too large a size."""
    return len(sizes) <= 8 and math.prod(max(n, 1) for n in sizes) < 2**59


def one_line(error: Exception) -> str:
    """The message of another library's error, or of one that quotes a stranger's file, fit to be part of ours."""
    return " ".join(str(error).split())[:300]
