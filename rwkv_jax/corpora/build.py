"""Text -> one memory-mapped token file in the cache, made once for each text and tokenizer.

    <cache>/<name>-<key>/tokens.bin     the tokens of train, valid and test, in this order
    <cache>/<name>-<key>/meta.json      what they are

A folder without both, and whole, is made anew.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rwkv_jax.corpora import text as texts
from rwkv_jax.corpora.corpus import SEPARATOR, Corpus, Split
from rwkv_jax.tokenizers import NAMES, TOKENIZER_FILE, Tokenizer, characters, get_tokenizer, save

_FORMAT = 1

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """$RWKV_JAX_CACHE, or rwkv_jax in $XDG_CACHE_HOME, or ~/.cache/rwkv_jax."""
    if folder := os.environ.get("RWKV_JAX_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rwkv_jax"


def prepare(source: str = "stdlib", tokenizer: str = "bytes") -> Corpus:
    """The tokens of `source`, from the cache or made now.

    Args:
        source: "stdlib", or the path of a file or folder. A file is cut by position, at 90 and 95 % of its
            bytes. The files of a folder are split by the hash of their relative path or, when fewer than 20,
            laid end to end and cut like one file. Left out of a folder are hidden files, files that are not
            UTF-8 text, and files more than half of whose lines occur in files before them, by order of path.
        tokenizer: "bytes" (a file may then hold any bytes), "characters" (those of the training split; the result
            names the file that lists them), or what else `get_tokenizer` takes.

    Raises:
        FileNotFoundError: no such source or tokenizer.
        ValueError: the source holds no text, too little for three splits, or no UTF-8 for this tokenizer.
    """
    encoder = None if tokenizer == "characters" else get_tokenizer(tokenizer)
    named = encoder is None or encoder.name in NAMES
    encoder_id = tokenizer if named else hashlib.sha256(Path(tokenizer).expanduser().read_bytes()).hexdigest()
    text = texts.stdlib() if source == "stdlib" else texts.local(Path(source).expanduser())
    key = hashlib.sha256(json.dumps([_FORMAT, text.identity, encoder_id]).encode()).hexdigest()
    folder = cache_dir() / f"{text.name[:40]}-{key[:16]}"
    bar = functools.partial(tqdm, disable=None, leave=False)

    if corpus := _read(folder, text.name, encoder):
        return corpus
    with _only_builder(folder.parent):
        if corpus := _read(folder, text.name, encoder):  # made by the process we waited for
            return corpus
        if folder.exists():
            _log.warning("tokens in %s are damaged: making them again", folder)
            shutil.rmtree(folder)
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir()
        try:
            splits = texts.split(text, source, tokenizer == "bytes", bar)
            if encoder is None:
                save(characters(map(_text, splits[0])), partial)
            _write(partial, splits, encoder or get_tokenizer(str(partial / TOKENIZER_FILE)), encoder_id, bar)
            partial.rename(folder)
        except UnicodeDecodeError:
            raise ValueError(f"{source} is not UTF-8, which tokenizer {tokenizer} needs") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _read(folder, text.name, encoder)


@contextlib.contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    """One builder at a time, so that any unfinished folder is a dead one's."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that prepares a corpus in %s", cache)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob("*.partial"):
            shutil.rmtree(leftover)
        yield


def _text(document: texts.Document) -> str:
    return b"".join(texts.blocks(document, lambda num_bytes: None)).decode()


def _read(folder: Path, name: str, encoder: Tokenizer | None) -> Corpus | None:
    """None where there is no whole build. Without an encoder the folder holds it, too."""
    try:
        encoder = encoder or get_tokenizer(str(folder / TOKENIZER_FILE))
        meta = json.loads((folder / "meta.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", meta["dtype"], mode="r")
        ends = list(accumulate(split["num_tokens"] for split in meta["splits"]))
        if len(tokens) != ends[-1]:
            return None
        splits = [
            Split(tokens[begin:end], np.array(s["starts"], np.int64), tuple(s["names"]), s["num_bytes"])
            for s, begin, end in zip(meta["splits"], [0, *ends], ends, strict=False)
        ]
        return Corpus(name, encoder.name, encoder.vocab_size, meta["sha256"], *splits)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, splits: list[list[texts.Document]], encoder: Tokenizer, encoder_id: str, bar) -> None:
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    sha256, records = hashlib.sha256(), []
    sizes = [sum(document.end - document.begin for document in documents) for documents in splits]
    progress = bar(desc="tokens", total=sum(sizes), unit="B", unit_scale=True)
    with progress, open(folder / "tokens.bin", "wb") as out:

        def put(tokens: np.ndarray) -> int:
            data = tokens.astype(dtype, copy=False).data
            sha256.update(data)
            out.write(data)
            return len(tokens)

        for documents, num_bytes in zip(splits, sizes, strict=True):
            starts, num_tokens = [], 0
            blocks = (texts.blocks(document, progress.update) for document in documents)
            for index, tokens in encoder.encode_documents(blocks):
                if index == len(starts):
                    starts.append(num_tokens)
                    num_tokens += put(np.array([SEPARATOR]))
                num_tokens += put(tokens)
            record = {"num_tokens": num_tokens, "num_bytes": num_bytes, "starts": starts}
            records.append(record | {"names": [document.name for document in documents]})
        out.flush()
        os.fsync(out.fileno())
    bounds = [(record["num_tokens"], record["starts"]) for record in records]
    sha256.update(json.dumps([encoder_id, dtype.name, bounds]).encode())
    with open(folder / "meta.json", "w") as out:
        json.dump({"sha256": sha256.hexdigest(), "dtype": dtype.name, "splits": records}, out)
        out.flush()
        os.fsync(out.fileno())
