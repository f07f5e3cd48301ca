"""Paths that a user gives, files and folders that appear whole or not at all, and the one reader of JSON files."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def user_path(path) -> Path:
    """Return the path that a user gave, as text or `os.PathLike`; ~ is the home folder.

    Raises:
      ValueError: it is empty or holds a NUL byte.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path, expected at least one character and no NUL byte")
    return Path(os.path.expanduser(text))  # which, unlike Path.expanduser, keeps the ~ of a file such as ~x.pth


@contextlib.contextmanager
def written(path) -> Iterator[BinaryIO]:
    """Yield a file to write, which replaces `path` at the end, synchronised; after an error `path` is as it was.

    Raises:
      OSError: as from `check_output`.
    """
    path = Path(path)
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
    """Yield a folder to fill, which replaces `path` at the end; after an error `path` is as it was."""
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


def check_output(path) -> None:
    """Raise OSError where `written` could put no file, before the work whose result the file is.

    Its folder does not exist or may not be written to, or the path is that of a folder or a device.
    """
    _check_writable(_beside_file(Path(path)))


def check_output_folder(path) -> None:
    """Raise OSError where no folder could be made, or the one that exists may not be written to; leaves nothing."""
    path = Path(path).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    _check_writable(nearest / f".{os.getpid()}.tmp")


def _check_writable(path: Path) -> None:
    try:
        path.touch()
    finally:
        path.unlink(missing_ok=True)


def _beside_file(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a folder or a device, expected the path of a file to write")
    return _beside(path)


def _beside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; cannot write {path.name} there")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def read_json(path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds anything else.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(data: str | bytes) -> dict[str, Any]:
    """The JSON object that `data` holds; ValueError for anything else, which does not name where `data` is from."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a JSON {type(value).__name__}, expected an object")
    return value


def one_line(error: Exception) -> str:
    """The message of another library's error, or of one that quotes a stranger's file, fit to be part of ours."""
    return " ".join(str(error).split())[:300]
