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
