"""Checkpoints: arrays written by Orbax, verified by a SHA-256 manifest.

`<folder>/<step>/` holds what Orbax wrote and `manifest.json`, the size and hash of every file, written last.
Orbax restores most flipped bytes without an error. A checkpoint is therefore read only after its files match the
manifest, and a folder without a manifest is not a checkpoint. The manifest is written once every array of
the tree has been found in what Orbax wrote.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rwkv_jax import files

MANIFEST = "manifest.json"

# Orbax logs every save through absl's one logger. This drops its info messages, and the tracebacks of its threads,
# whose errors reach the caller. Its warnings stay, and so do messages of others.
logging.getLogger("absl").addFilter(
    lambda r: "/orbax/" not in r.pathname or (r.levelno >= logging.WARNING and not r.exc_info)
)

_writer = ThreadPoolExecutor(1, "checkpoint")


def save(folder, step: int, tree: Any, keep: int = 2) -> None:
    """Call `save_async`, and return once the checkpoint is complete on disk."""
    save_async(folder, step, tree, keep).result()


def save_async(folder, step: int, tree: Any, keep: int = 2) -> Future:
    """Write `tree` as the checkpoint of `step`; return once the arrays are copied to the host.

    A thread does the rest, and the caller may donate the arrays meanwhile; the next save waits for the thread. (On a
    CPU the host's copy is the device's buffer itself, which JAX then copies instead of donating it.) The step's folder
    appears by an atomic rename, once its files are synced. Only then are other checkpoints removed: all but the newest
    `keep` up to `step`, and any later ones, which a run that was rewound has abandoned. A save that fails or is killed
    leaves earlier checkpoints untouched; its partial files are removed at once, or by the next save.

    Args:
      folder: shared by all hosts, every one of which must call this.
      step: >= 0. An existing checkpoint of the same step is replaced.
      tree: any pytree of `jax.Array`s, NumPy arrays or scalars.
      keep: >= 1.

    Returns:
      a future, done when the checkpoint is complete on disk. Its `result()` raises OSError where the checkpoint could
      not be written, for instance on a full disk.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1 checkpoint to keep")
    folder = Path(folder).absolute()
    wait()
    problem = _prepare(folder, tree) if jax.process_index() == 0 else "see the first host"
    if multihost_utils.broadcast_one_to_all(np.int32(bool(problem))):  # no host writes before the folder is clean
        unsaved = Future()
        unsaved.set_exception(OSError(f"{folder / str(step)}: not saved: {problem}"))
        return unsaved
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(files.plainly_named(folder)) / f"{step}.partial"
        orbax = stack.enter_context(ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()))
        orbax.save(partial, args=ocp.args.PyTreeSave(tree))
        saved = jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), tree)
        saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        return _writer.submit(_complete, stack.pop_all(), orbax, partial, saved, folder, step, keep)


def wait() -> None:
    """Wait until the saves that this process has begun have succeeded or failed."""
    _writer.submit(int).result()


def _prepare(folder: Path, tree: Any) -> str:
    """Remove partial files of killed saves; return why the folder cannot take the tree, or "".

    Without the check of free space Orbax would fill the disk, and every other writer would fail too.
    """
    needed = sum(getattr(x, "nbytes", 8) for x in jax.tree.leaves(tree))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error)
    return f"it needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free" if free < needed else ""


def _complete(held, orbax, written: Path, saved: Any, folder: Path, step: int, keep: int) -> None:
    """Wait until Orbax has committed on every host; the first host then adds the manifest and renames the folder."""
    complete, partial = folder / str(step), folder / f"{step}.partial"
    try:
        with held:
            orbax.wait_until_finished()
            if jax.process_index() == 0:
                _check(partial, _stored(orbax, written, partial), saved)
        if jax.process_index() == 0:
            _write_manifest(partial)
            if complete.exists():
                _remove(complete)
            os.replace(partial, complete)
            _synchronise(folder)
            kept = [s for s in steps(folder) if s <= step][-keep:]
            for stale in set(steps(folder)) - set(kept):
                _remove(folder / str(stale))
    except Exception as error:  # Orbax and TensorStore raise many types for errors of a file system
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the next save removes what this one cannot
                _remove_partial(folder)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{complete}: not saved: {reason}") from error


def steps(folder) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending; their files are not verified."""
    folder = Path(folder)
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and _has_manifest(path))


def verify(folder, step: int) -> None:
    """Compare every file of a checkpoint with the SHA-256 in its manifest.

    Raises:
      ValueError: naming the first file that is missing or differs.
    """
    path = Path(folder) / str(step)
    if not _has_manifest(path):
        raise ValueError(f"{path}: no complete checkpoint; {folder} has steps {steps(folder)}")
    written = (path / MANIFEST).read_bytes()
    try:
        recorded = files.parse_json(written)
        if _encode(recorded) != written:
            raise ValueError("not as written by save")
        digests = {name: entry["sha256"] for name, entry in recorded.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged checkpoint: {MANIFEST}: {error}") from error
    for name in digests:
        if not (path / name).is_file():
            raise ValueError(f"{path}: damaged checkpoint: file {name} is missing")
    with ThreadPoolExecutor() as pool:
        found = dict(zip(digests, pool.map(lambda name: _sha256(path / name), digests), strict=True))
    for name, digest in digests.items():
        if found[name] != digest:
            raise ValueError(f"{path}: damaged checkpoint: file {name} differs from its SHA-256")


def restore(
    folder, like: Any, step: int | None = None, key: str | None = None, drop: tuple[str, ...] = ()
) -> tuple[int, Any]:
    """Return step and tree of a verified checkpoint: that of `step`, or the newest valid one.

    Each damaged checkpoint that is skipped is reported in one line on stderr.

    Args:
      like: the expected tree. A leaf with a sharding (a `jax.Array`, or a `jax.ShapeDtypeStruct` that has
        one) is restored as a `jax.Array` on that sharding, whatever sharding it was saved from; one without,
        as a NumPy array.
      key: restore only the subtree of this name ("params"); `like` is then that subtree.
      drop: names of the stored tree that are not read; they may be absent.

    Raises:
      ValueError: no checkpoint is valid, or a leaf's presence, shape or dtype is not as in `like`.
    """
    folder = Path(folder).absolute()
    if step is None:
        step = _newest_valid(folder)
    else:
        verify(folder, step)
    path = folder / str(step)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
    item = jax.tree.map(abstract, like if key is None else {key: like})
    with files.plainly_named(folder) as plain, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        stored = {k: v for k, v in dict(_stored(orbax, plain / str(step), path)).items() if k not in drop}
        _check(path, stored if key is None else {key: stored[key]} if key in stored else {}, item)
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        # partial, as `_check` has compared all arrays: a None of the tree may be absent on disk
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        tree = orbax.restore(plain / str(step), args=args)
    return step, tree if key is None else tree[key]


def _newest_valid(folder: Path) -> int:
    newest = -1
    if jax.process_index() == 0:
        for step in reversed(steps(folder)):
            try:
                verify(folder, step)
            except (ValueError, OSError) as error:  # damaged, or on a disk that fails
                print(f"{error}; trying the previous one", file=sys.stderr)
            else:
                newest = step
                break
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest < 0:
        raise ValueError(f"{folder}: no valid checkpoint (complete ones: {steps(folder)})")
    return newest


def _stored(orbax, path: Path, name: Path) -> Any:
    """Return the tree of shapes and dtypes in the checkpoint at `path`, called `name`."""
    metadata = orbax.metadata(path).item_metadata
    if metadata is None:
        raise ValueError(f"{name}: damaged checkpoint: Orbax finds no arrays in it")
    return metadata.tree


def _check(path: Path, stored: Any, like: Any) -> None:
    described = lambda tree: {
        jax.tree_util.keystr(keys, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found, expected = described(stored), described(like)
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'absent')} in the checkpoint, "
                f"expected {expected.get(name, 'no such leaf')}"
            )


def _has_manifest(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _write_manifest(path: Path) -> None:
    paths = sorted(file for file in path.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, paths))
        list(pool.map(_synchronise, [*paths, *{file.parent for file in paths}]))
    entry = lambda file, digest: {"bytes": file.stat().st_size, "sha256": digest}
    entries = {
        file.relative_to(path).as_posix(): entry(file, digest) for file, digest in zip(paths, digests, strict=True)
    }
    beside = path / f"{MANIFEST}.partial"
    beside.write_bytes(_encode(entries))
    _synchronise(beside)
    os.replace(beside, path / MANIFEST)
    _synchronise(path)


def _encode(entries: dict) -> bytes:
    return (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synchronise(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_partial(folder: Path) -> None:
    """Delete unfinished saves. Threads of Orbax may write for a moment after their save has failed."""
    for attempt in reversed(range(10)):
        try:
            for path in folder.iterdir():
                if re.fullmatch(r"\d+\.partial.*", path.name):
                    shutil.rmtree(path)
            return
        except OSError:
            if not attempt:
                raise
            time.sleep(0.1)


def _remove(path: Path) -> None:
    """Delete a checkpoint. A kill in between leaves no checkpoint rather than a damaged one."""
    doomed = path.with_name(f"{path.name}.partial.removed")
    os.replace(path, doomed)
    shutil.rmtree(doomed)
