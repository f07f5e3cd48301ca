"""Cache folders: each appears atomically, is built by one process at a time, and is rebuilt if damaged.

<cache>/<name>-<key>/record.json    the JSON object that the builder returned
<cache>/<name>-<key>/SHA256SUMS     digests of all other files, in the format of `sha256sum`
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rwkv_jax.files import read_json, user_path

_FORMAT = 6
_RECORD, _SUMS = "record.json", "SHA256SUMS"

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return $RWKV_JAX_CACHE, or rwkv_jax in $XDG_CACHE_HOME, or ~/.cache/rwkv_jax."""
    if folder := os.environ.get("RWKV_JAX_CACHE"):
        return user_path(folder)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rwkv_jax"


def folder(name: str, identity: list) -> Path:
    """Return the path of the folder for content that `identity`, JSON values, determines."""
    key = hashlib.sha256(json.dumps([_FORMAT, identity]).encode()).hexdigest()
    return cache_dir() / f"{name[:40]}-{key[:16]}"


def made(folder: Path, make: Callable[[Path], dict]) -> dict:
    """Return the record of `folder`, which is built first if it is missing or damaged.

    Every call reads all files of the folder to verify them, about one second a gigabyte.

    Args:
        make: fills the empty folder that it is given, and returns the record, a JSON object.
    """
    if (record := _verified(folder)) is not None:
        return record
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that prepares a corpus in %s", folder.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (record := _verified(folder)) is not None:  # built by the process that held the lock
            return record
        for leftover in folder.parent.glob("*.partial"):  # of a killed process: a living one would hold the lock
            shutil.rmtree(leftover)
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir()
        try:
            record = make(partial)
            (partial / _RECORD).write_text(json.dumps(record))
            (partial / _SUMS).write_bytes(_sums(partial))
            if folder.exists():
                _log.warning("%s is damaged: rebuilding it", folder)
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return record


def _verified(folder: Path) -> dict | None:
    try:
        if (folder / _SUMS).read_bytes() == _sums(folder):
            return read_json(folder / _RECORD)
    except FileNotFoundError:
        pass
    return None


def _sums(folder: Path) -> bytes:
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _SUMS):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()
