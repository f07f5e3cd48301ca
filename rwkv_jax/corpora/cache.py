"""Folders of the cache: each appears whole, is made by one process, and notices when it is damaged.

<cache>/<name>-<key>/meta.json     what the folder holds, and the CRC-32 of all its files, 16 MiB by 16 MiB
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

_FORMAT = 2
_CRC_BYTES = 1 << 24
# Read at every start: all of a small corpus, and so much of a large one that the start stays below a second.
_CHECKED_BLOCKS = 16
_SHARDS_SECONDS = 7 * 24 * 3600

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """$RWKV_JAX_CACHE, or rwkv_jax in $XDG_CACHE_HOME, or ~/.cache/rwkv_jax."""
    if folder := os.environ.get("RWKV_JAX_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rwkv_jax"


def folder(name: str, identity: list) -> Path:
    key = hashlib.sha256(json.dumps([_FORMAT, identity]).encode()).hexdigest()
    return cache_dir() / f"{name[:40]}-{key[:16]}"


def made(folder: Path, make: Callable[[Path], dict]) -> dict:
    """The JSON object that `make(empty folder)` returned when it filled `folder`, now or in an earlier call.

    One process makes at a time; what it made appears when it is whole. A damaged folder is made again, with a warning.
    """
    if record := _read(folder, _log.warning):
        return record
    partial = folder.with_name(folder.name + ".partial")
    with _only_maker(folder.parent):
        if record := _read(folder, _log.debug):  # made by the process we waited for
            return record
        partial.mkdir()
        try:
            record = json.loads(json.dumps(make(partial)))
            _seal(partial, record)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return record


@contextlib.contextmanager
def _only_maker(cache: Path) -> Iterator[None]:
    """One maker at a time, so that any unfinished folder is a dead one's."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that prepares a corpus in %s", cache)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob("*.partial"):
            shutil.rmtree(leftover)
        for shards in cache.glob("*.shards"):  # of work that nobody went on with
            if time.time() - shards.stat().st_mtime > _SHARDS_SECONDS:
                shutil.rmtree(shards)
        yield


def _read(folder: Path, tell) -> dict | None:
    """The record of a folder; None where there is none, or a damaged one.

    Of every file the size is checked, and up to 256 MiB of content: all of it, or blocks drawn anew at each call.
    """
    if not folder.exists():
        return None
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        _expect(meta["crc"] == _meta_crc(meta["files"], meta["record"]))
        blocks = []
        for name, (size, crcs) in meta["files"].items():
            path = folder / name
            _expect(path.stat().st_size == size)
            blocks += [(path, i, crc) for i, crc in enumerate(crcs)]
        for path, i, crc in random.sample(blocks, min(len(blocks), _CHECKED_BLOCKS)):
            with open(path, "rb") as file:
                file.seek(i * _CRC_BYTES)
                _expect(zlib.crc32(file.read(_CRC_BYTES)) == crc)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        tell("%s is damaged: making it again", path)
        return None
    return meta["record"]


def _expect(good: bool) -> None:
    if not good:
        raise ValueError("not what was written")


def _seal(folder: Path, record: dict) -> None:
    files = {path.name: [path.stat().st_size, list(_crcs(path))] for path in sorted(folder.iterdir())}
    with open(folder / "meta.json", "w") as out:
        json.dump({"files": files, "record": record, "crc": _meta_crc(files, record)}, out)
        sync(out)


def _meta_crc(files: dict, record: dict) -> int:
    return zlib.crc32(json.dumps([files, record]).encode())


def _crcs(path: Path) -> Iterator[int]:
    with open(path, "rb") as file:
        while block := file.read(_CRC_BYTES):
            yield zlib.crc32(block)


def sync(out) -> None:
    out.flush()
    os.fsync(out.fileno())
