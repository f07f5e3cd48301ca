"""Raw text -> one memory-mapped token file with train, validation and test splits.

`prepare` takes the embedded corpus (the source of Python's own standard library), a text file or a folder.
The tokens are made once for each text and tokenizer, and lie in a cache folder, `cache_dir()`:

    <cache>/<name>-<key>/tokens.bin     the tokens of train, valid and test, in this order
    <cache>/<name>-<key>/meta.json      what they are; a folder without both, and whole, is made anew

Each document is preceded by the separator, token 0, as in the data and the evaluation of the released models,
so that its first token is predicted too.
"""

import codecs
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import sysconfig
import zlib
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rwkv_jax.tokenizers import NAMES, TOKENIZER_FILE, Tokenizer, characters, get_tokenizer, save

SEPARATOR = 0

_FORMAT = 1
_BLOCK_BYTES = 1 << 20
# The usual split of enwik8 is by megabytes, wherever in a character they end.
_ENWIK8_BYTES = 100_000_000
# With fewer files than this the share of each split would be an accident of the hash.
_MIN_FILES = 20
# Shorter lines (`else:`, `return x`) repeat everywhere and say nothing about where a file comes from.
_MIN_LINE_BYTES = 16

# Top-level modules and packages that CPython 3.11 to 3.13 have in common. Installations differ in the rest:
# tests, tkinter, idlelib, ensurepip, site-packages. `encodings` and `pydoc_data` are tables.
_STDLIB = """
__future__ _collections_abc _compat_pickle _markupbase _py_abc _pydecimal _pyio _sitebuiltins _strptime
_threading_local _weakrefset abc antigravity argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd
code codecs codeop collections colorsys compileall concurrent configparser contextlib contextvars copy copyreg
csv ctypes curses dataclasses datetime dbm decimal difflib dis doctest email enum filecmp fileinput fnmatch
fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http
imaplib importlib inspect io ipaddress json keyword linecache locale logging lzma mailbox mimetypes
modulefinder multiprocessing netrc ntpath numbers opcode operator optparse os pathlib pdb pickle pickletools
pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri
random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket
socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny
tarfile tempfile textwrap this threading timeit token tokenize tomllib trace traceback tracemalloc tty turtle
types typing unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile
zipimport zoneinfo
""".split()  # noqa: SIM905 (quotes and commas would bury the names)

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Documents one after another; document i is tokens[starts[i] : starts[i + 1]], separator included."""

    tokens: np.memmap  # [tokens] read-only; uint8, uint16 or uint32, the smallest that holds the vocabulary
    starts: np.ndarray  # [documents] int64, where the documents' separators are
    names: tuple[str, ...]  # [documents] paths relative to the source
    num_bytes: int  # UTF-8 bytes of the documents, separators not counted: what bits per byte divide by


class Corpus(NamedTuple):
    name: str
    tokenizer: str  # what `get_tokenizer` takes
    vocab_size: int
    sha256: str  # of the tokens, their type, the bounds of splits and documents, and the tokenizer
    train: Split
    valid: Split
    test: Split


class _Document(NamedTuple):
    name: str
    path: str
    begin: int  # bytes of the file at `path`
    end: int


class _Source(NamedTuple):
    name: str
    files: list[_Document]  # that are not empty, in the order of their names
    identity: list  # JSON values that change when the text does
    is_folder: bool


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
    text = _stdlib() if source == "stdlib" else _local(Path(source).expanduser())
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
            splits = _split(text, source, encoder, bar)
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


def _text(document: _Document) -> str:
    return b"".join(_blocks(document, lambda num_bytes: None)).decode()


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


def _write(folder: Path, splits: list[list[_Document]], encoder: Tokenizer, encoder_id: str, bar) -> None:
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
            blocks = (_blocks(document, progress.update) for document in documents)
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


def _blocks(document: _Document, advance: Callable[[int], object]) -> Iterator[bytes]:
    with open(document.path, "rb") as file:
        file.seek(document.begin)
        missing = document.end - document.begin
        while missing:
            block = file.read(min(missing, _BLOCK_BYTES))
            if not block:
                raise ValueError(f"{document.path} became shorter while it was read")
            missing -= len(block)
            advance(len(block))
            yield block


def _stdlib() -> _Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [root / f"{module}.py" for module in _STDLIB]
    paths += [path for module in _STDLIB for path in (root / module).rglob("*.py")]
    files = _files(root, [path for path in paths if "/test" not in path.relative_to(root).as_posix()])
    if not files:
        raise ValueError(f"no source of the standard library in {root}: name a text file or folder instead")
    name = f"stdlib-{platform.python_version()}"
    contents = [(file.name, hashlib.sha256(Path(file.path).read_bytes()).hexdigest()) for file in files]
    return _Source(name, files, [name, contents], is_folder=True)


def _local(path: Path) -> _Source:
    if not path.exists():
        raise FileNotFoundError(f"no corpus {path}: expected 'stdlib' or the path of a text file or folder")
    path = path.resolve()
    visible = (file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path).as_posix()}")
    files = _files(path, visible) if path.is_dir() else _files(path.parent, [path])
    if not files:
        raise ValueError(f"{path} is empty: expected a text file, or a folder of visible text files")
    identity = [(file.name, file.end, os.stat(file.path).st_mtime_ns) for file in files]
    return _Source(path.name, files, [str(path), identity], path.is_dir())


def _files(root: Path, paths: Iterable[Path]) -> list[_Document]:
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    files = [_Document(name, str(path), 0, path.stat().st_size) for name, path in named]
    return [file for file in files if file.end]


def _split(text: _Source, source: str, encoder: Tokenizer | None, bar) -> list[list[_Document]]:
    documents = list(_distinct(bar(text.files, desc="files"))) if text.is_folder else text.files
    if not documents:
        raise ValueError(f"{source} holds no UTF-8 text")
    splits = [[], [], []]
    for document in documents:
        percent = int.from_bytes(hashlib.sha256(os.fsencode(document.name)).digest()[:8]) % 100
        splits[(percent >= 90) + (percent >= 95)].append(document)
    if len(documents) < _MIN_FILES or not all(splits):
        splits = _by_position(documents, exact=encoder is not None and encoder.name == "bytes")
    if not all(splits):
        num_bytes = sum(document.end for document in documents)
        raise ValueError(f"{source} holds {num_bytes} bytes of text: too few for train, valid and test")
    return splits


def _by_position(documents: list[_Document], exact: bool) -> list[list[_Document]]:
    """Cut at 90 and 95 % of the bytes, or up to 3 bytes before, where a UTF-8 character begins."""
    begins = list(accumulate((document.end for document in documents), initial=0))
    total = begins.pop()
    cuts = [total * 90 // 100, total * 95 // 100]
    if not (exact and total == _ENWIK8_BYTES):
        for i, cut in enumerate(cuts):
            cut_document = bisect(begins, cut) - 1
            cuts[i] -= _cut_bytes(documents[cut_document].path, cut - begins[cut_document])
    splits = []
    for low, high in pairwise([0, *cuts, total]):
        parts = [
            document._replace(begin=max(low - begin, 0), end=min(high - begin, document.end))
            for document, begin in zip(documents, begins, strict=True)
        ]
        splits.append([part for part in parts if part.begin < part.end])
    return splits


def _cut_bytes(path: str, position: int) -> int:
    """How many bytes just before `position` begin a UTF-8 character that ends after it: 0 to 3."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open(path, "rb") as file:
        file.seek(max(0, position - 3))
        decoder.decode(file.read(min(3, position)))
    return len(decoder.getstate()[0])


def _distinct(files: Iterable[_Document]) -> Iterator[_Document]:
    """The text files that do not mostly repeat lines of those before them.

    Lines are 29-bit hashes in a bit map of 64 MiB: at 1 GB of text, one new line in 50 seems repeated.
    """
    seen = np.zeros(1 << 26, np.uint8)
    for file in files:
        if (hashes := _line_hashes(file.path)) is not None:
            byte, bit = hashes >> 3, (1 << (hashes & 7)).astype(np.uint8)
            if np.mean((seen[byte] & bit) != 0) <= 0.5:
                np.bitwise_or.at(seen, byte, bit)
                yield file


def _line_hashes(path: str) -> np.ndarray | None:
    """Hashes of the long lines, or of the whole if there is none; None unless it is UTF-8 without NUL."""
    hashes, whole = set(), 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                if "\0" in line:
                    return None
                whole = zlib.crc32(line.encode(), whole)
                if len(line := line.strip().encode()) >= _MIN_LINE_BYTES:
                    hashes.add(zlib.crc32(line) >> 3)
    except UnicodeDecodeError:
        return None
    return np.array(list(hashes or {whole >> 3}), np.uint32)
