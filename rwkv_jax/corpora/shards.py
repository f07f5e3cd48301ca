"""Text -> tokens, shard by shard, here or in processes of their own; what is done outlives a kill.

    <folder>/<SHA-256 of the shard's text>.npz    its tokens, and how many each piece has

Shards are the same on any number of processes, and so is what they become.
"""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_jax.corpora.corpus import Document
from rwkv_jax.tokenizers import ByteTokenizer, Tokenizer, get_tokenizer, pieces

SHARD_BYTES = 1 << 23


class Piece(NamedTuple):
    """Some text of a document, so cut that no token reaches across."""

    split: int
    text: bytes
    given: bool  # not to be predicted
    name: str | None  # of the document that begins here; None: it goes on


def encode(documents: Iterable[Document], encoder: Tokenizer, folder: Path, processes: int = 1) -> Iterator:
    """Pairs of piece and array of tokens, in order.

    Args:
        folder: where shards lie until the caller removes them.
        processes: 1 leaves the work to the threads of the tokenizer's library; more have a thread each.

    Raises:
        OSError: a process was killed, or the disk is full.
    """
    shards = _shards(_pieces(documents, encoder))
    if isinstance(encoder, ByteTokenizer):  # nothing to be saved
        for shard in shards:
            yield from ((piece, np.frombuffer(piece.text, np.uint8)) for piece in shard)
        return
    folder.mkdir(parents=True, exist_ok=True)
    waiting, depth = deque(), 0 if processes == 1 else 2 * processes
    with _submitter(encoder, folder, processes) as submit:
        for shard in shards:
            waiting.append((shard, submit([piece.text for piece in shard])))
            if len(waiting) > depth:
                yield from _result(*waiting.popleft())
        while waiting:
            yield from _result(*waiting.popleft())


def _result(shard: list[Piece], job) -> Iterator[tuple[Piece, np.ndarray]]:
    try:
        path = job()
    except BrokenProcessPool:
        raise OSError(
            "a process that makes tokens was killed, for want of memory perhaps; the same command goes on from here"
        ) from None
    tokens, ends = _load(path)
    for piece, (begin, end) in zip(shard, pairwise([0, *ends.tolist()]), strict=True):
        yield piece, tokens[begin:end]


def _pieces(documents: Iterable[Document], encoder: Tokenizer) -> Iterator[Piece]:
    for document in documents:
        name = document.name
        for blocks, given in (([document.prompt], True), (document.blocks, False)):
            for piece in pieces(encoder, filter(None, blocks)):
                yield Piece(document.split, piece, given, name)
                name = None


def _shards(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    shard, num_bytes = [], 0
    for piece in pieces:
        shard.append(piece)
        num_bytes += len(piece.text)
        if num_bytes >= SHARD_BYTES:
            yield shard
            shard, num_bytes = [], 0
    if shard:
        yield shard


@contextlib.contextmanager
def _submitter(encoder: Tokenizer, folder: Path, processes: int):
    if processes == 1:
        yield lambda texts: partial(_make, encoder, folder, texts)
        return
    # Spawned: a fork of a process that computes with jax may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin_process)
    try:
        yield lambda texts: pool.submit(_make_by_name, encoder.name, folder, texts).result
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


_tokenizer = cache(get_tokenizer)


def _make_by_name(name: str, folder: Path, texts: list[bytes]) -> Path:
    return _make(_tokenizer(name), folder, texts)


def _make(encoder: Tokenizer, folder: Path, texts: list[bytes]) -> Path:
    """The file of a shard, as an earlier call left it or made now."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8))
        digest.update(text)
    path = folder / f"{digest.hexdigest()}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        _load(path)
        return path
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    arrays, num_tokens = [np.empty(0, dtype)], np.zeros(len(texts), np.int64)
    for index, ids in encoder.encode_documents([text] for text in texts):
        arrays.append(ids.astype(dtype, copy=False))
        num_tokens[index] += len(ids)
    beside = path.with_suffix(f".{os.getpid()}.npz")
    try:
        np.savez(beside, tokens=np.concatenate(arrays), ends=np.cumsum(num_tokens))
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:  # a zip file, whose CRC-32 tells damage
        return arrays["tokens"], arrays["ends"]
