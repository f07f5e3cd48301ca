"""User paths, atomic writes of files and folders, and JSON, read and written."""

import contextlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 100  # of nested JSON; no file read here needs 10


def user_path(path) -> Path:
    """Return the path that a user gave, as text or `os.PathLike`; ~ is the home folder.

    Raises:
      ValueError: it is empty, holds a NUL byte, or needs a home folder that nobody has.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not a path, expected at least one character and no NUL byte")
    expanded = os.path.expanduser(text)  # which, unlike Path.expanduser, keeps the ~ of a file such as ~x.pth
    if f"{expanded}/".startswith("~/"):
        raise ValueError(f"{text} begins with the home folder, and there is none: set HOME, or name the whole path")
    return Path(expanded)


@contextlib.contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
    """Yield an absolute path to an existing folder, of plain characters only: a temporary link if its own has others.

    Orbax takes some characters of a path as a pattern; TensorStore and JAX's profiler accept only UTF-8.
    """
    folder = folder.absolute()
    if re.fullmatch(r"[\w/.,=+ -]+", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rwkv_jax-") as elsewhere:
        link = Path(elsewhere, "folder")
        link.symlink_to(folder)
        yield link


@contextlib.contextmanager
def written(path) -> Iterator[BinaryIO]:
    """Yield a file to write, which atomically replaces `path` at the end, synced; an error leaves `path` unchanged.

    If `path` is a link, its target is replaced.

    Raises:
      OSError: as from `check_output`.
    """
    path = _followed(path)
    beside = _beside_file(path)
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
    """Yield a folder to fill, which replaces `path` at the end; an error leaves `path` unchanged.

    If `path` is a link, its target is replaced.
    """
    path = _followed(path)
    beside = _beside(path)
    old = beside.with_suffix(".old")
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def check_output(path) -> None:
    """Raise OSError if `written` could not write `path`; to be called before the work whose result the file is.

    Its folder does not exist or is not writable, or the path is that of a folder or a device.
    """
    _check_writable(_beside_file(_followed(path)), path)


def check_output_folder(path) -> None:
    """Raise OSError if the folder can neither be created nor, if it exists, be written to; creates nothing."""
    path = Path(path).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    _check_writable(nearest / f".{secrets.token_hex(4)}.tmp", path)


def _followed(path) -> Path:
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _check_writable(beside: Path, path: Path) -> None:
    try:
        beside.touch()
        beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from None


def _beside_file(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a folder or a device, expected the path of a file to write")
    return _beside(path)


def _beside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; cannot write {path.name} there")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process ids repeat over hosts of a shared disk


def num_bytes(path) -> int:
    """Return the size of a file, or of all files in a folder; 0 if there is none."""
    parts = [path, *(Path(parent, name) for parent, _, names in os.walk(path) for name in names)]
    total = 0
    for part in parts:
        with contextlib.suppress(FileNotFoundError):  # another process may clear it away
            total += 0 if os.path.isdir(part) else os.lstat(part).st_size
    return total


def say_written(path) -> None:
    """Print on stderr what a command has written: a path, and its size."""
    print(f"wrote {path}, {num_bytes(path):,} bytes", file=sys.stderr)


def read_json(path, expected: type = dict) -> Any:
    """Return the object in a JSON file, or the list if `expected` is `list`.

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds anything else.
    """
    try:
        return parse_json(Path(path).read_bytes(), expected)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(data: str | bytes, expected: type = dict) -> Any:
    """Return the JSON object or list in `data`; ValueError, which does not name the source, for anything else.

    All untrusted JSON is read here. Nesting deeper than `MAX_DEPTH` is refused, so that no function that traverses the
    value exceeds Python's recursion limit.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, expected):
        wanted = {dict: "an object", list: "a list"}[expected]
        raise ValueError(f"holds a JSON {type(value).__name__}, expected {wanted}")
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"JSON nested more than {MAX_DEPTH} deep")
        inside = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level, depth = list(itertools.chain.from_iterable(inside)), depth + 1
    return value


def to_json(value, indent: int | None = None) -> str:
    """Return the JSON of a value, with arrays of NumPy or JAX; numbers that are not finite become null.

    It is ASCII, so that it can be read even if it contains file names that are not UTF-8.
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """Return the JSON value of an array, a number or a tree of them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: Exception) -> str:
    """Return a foreign error's message on one line, shortened, to be quoted in ours."""
    return " ".join(str(error).split())[:300]
