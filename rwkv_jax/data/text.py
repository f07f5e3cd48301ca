"""Text of Python's standard library, a local file or a folder, and its splits.

A file is cut by position, at 90 and 95 % of its bytes. A folder with a subfolder train and one of validation or test,
by any of their usual names, is split by these; `splitter` takes a missing one from train. In any other folder, files
are split by the hash of their relative path or, if fewer than 20, concatenated and cut like one file. Left out of a
folder, and counted, are hidden files, linked folders, files beside the subfolders of splits, files that are not UTF-8
text, and files more than half of whose lines occur in earlier files, by order of path.
"""

import codecs
import hashlib
import os
import platform
import sysconfig
import zlib
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rwkv_jax.data import contents
from rwkv_jax.data.corpus import READ, SPLITS, Document, Source, left_out, split_named, splitter
from rwkv_jax.files import user_path

_BLOCK_BYTES = 1 << 20
# The usual split of enwik8 is by megabytes, wherever in a character they end.
_ENWIK8_BYTES = 100_000_000
# With fewer files than this the share of each split would depend on chance.
_MIN_FILES = 20
# Shorter lines (`else:`, `return x`) repeat everywhere and say nothing about where a file comes from.
_MIN_LINE_BYTES = 16
_SEEN_BYTES = 1 << 26  # of the bit map of their hashes

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


class _File(NamedTuple):
    name: str
    path: str
    begin: int  # bytes of the file at `path`
    end: int


def source(name: str, exact: bool) -> Source:
    """Return the source of "stdlib" or a path.

    Args:
        exact: allows a cut inside a character.
    """
    path = user_path(name)
    tally = Counter()
    title, identity, files = _stdlib() if name == "stdlib" else _local(path, tally)
    is_folder = name == "stdlib" or path.is_dir()
    splits = cache(lambda: _split(files, is_folder, name, exact, tally))

    def documents():
        for split, parts in enumerate(splits()):
            for part in parts:
                yield Document(split, blocks(part.path, part.begin, part.end), name=part.name)

    is_ours = name == "stdlib"  # whose omissions are always the same
    num_bytes = sum(file.end for file in files)
    return Source(title, identity, num_bytes, documents, Counter() if is_ours else tally)


def blocks(path: str | Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the blocks of a file between two positions."""
    with open(path, "rb") as file:
        missing = (os.path.getsize(path) if end is None else end) - begin
        file.seek(begin)
        while missing:
            block = file.read(min(missing, _BLOCK_BYTES))
            if not block:
                raise ValueError(f"{path} was truncated while it was read")
            missing -= len(block)
            yield block


def _stdlib() -> tuple[str, list, list[_File]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [root / f"{module}.py" for module in _STDLIB]
    paths += [path for module in _STDLIB for path in (root / module).rglob("*.py")]
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    files = [file for file in _files(named) if file.end and "/test" not in file.name]
    if not files:
        raise ValueError(f"no source of the standard library in {root}: name a text file or folder instead")
    name = f"stdlib-{platform.python_version()}"
    digests = [(file.name, hashlib.sha256(Path(file.path).read_bytes()).hexdigest()) for file in files]
    return name, [name, digests], files


def _local(path: Path, tally: Counter) -> tuple[str, list, list[_File]]:
    if not path.exists():
        raise FileNotFoundError(f"no corpus {path}: expected 'stdlib', a name such as enwik8, or a path")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or device, and a corpus is read twice: expected a file or a folder")
    path = contents.absolute(path)
    if path.is_dir():
        files = _files(contents.visible(path, tally))
    else:
        contents.expect_plain(path)
        files = _files([(path.name, path)] if path.stat().st_size else [])
    if not files:
        raise ValueError(
            f"{path} is empty: expected a text file, or a folder of visible text files{left_out(tally, '; ')}"
        )
    identity = [(file.name, file.end, os.stat(file.path).st_mtime_ns) for file in files]
    return path.name, [str(path), identity], files


def _files(named: Iterable[tuple[str, Path]]) -> list[_File]:
    return [_File(name, str(path), 0, path.stat().st_size) for name, path in named]


def _split(files: list[_File], is_folder: bool, source: str, exact: bool, tally: Counter) -> list[list[_File]]:
    named = {file.name: split_named(file.name.partition("/")[0]) for file in files if "/" in file.name}
    given = set(named.values()) - {None}
    is_split = is_folder and 0 in given and len(given) > 1
    if is_split:
        kept = [file for file in files if named.get(file.name) is not None]
        tally["files", "beside the subfolders of splits"] += len(files) - len(kept)
        files = kept
    documents = list(_distinct(tqdm(files, desc="files", disable=None, leave=False), tally)) if is_folder else files
    if not documents:
        raise ValueError(f"{source} holds no UTF-8 text{left_out(tally, '; ')}")
    of_train = splitter([split for split in (1, 2) if split not in given])
    number = (lambda name: named[name] or of_train(os.fsencode(name))) if is_split else _number_by_hash
    numbers = [number(document.name) for document in documents]
    splits = [[d for d, its in zip(documents, numbers, strict=True) if its == i] for i in range(len(SPLITS))]
    if not is_split and (len(documents) < _MIN_FILES or not all(splits)):
        splits = _by_position(documents, exact)
    if not all(splits):
        num_bytes, left = sum(document.end for document in documents), left_out(tally, "; ")
        raise ValueError(f"{source} holds {num_bytes} bytes of text: too few for train, valid and test{left}")
    return splits


def _number_by_hash(name: str) -> int:
    percent = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % 100
    return (percent >= 90) + (percent >= 95)


def _by_position(documents: list[_File], exact: bool) -> list[list[_File]]:
    """Cut at 90 and 95 % of the bytes, moved back up to 3 bytes to the start of a UTF-8 character."""
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
    """Return the number of bytes, 0 to 3, by which a UTF-8 character that spans `position` begins before it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open(path, "rb") as file:
        file.seek(max(0, position - 3))
        decoder.decode(file.read(min(3, position)))
    return len(decoder.getstate()[0])


def _distinct(files: Iterable[_File], tally: Counter) -> Iterator[_File]:
    """Yield the text files of which at most half of the lines occur in earlier files; count the others.

    The lines' hashes are in a bit map: at 1 GB of text, one new line in 50 finds its bit set by chance. That share is
    subtracted.
    """
    seen, num_set = np.zeros(_SEEN_BYTES, np.uint8), 0
    for file in files:
        hashes = _line_hashes(file.path)
        if hashes is None:
            tally["files", contents.packing(file.path) or "not UTF-8 text"] += 1
            continue
        byte, bit = hashes >> 3, (1 << (hashes & 7)).astype(np.uint8)
        repeated, by_chance = np.mean((seen[byte] & bit) != 0), num_set / (8 * len(seen))
        if repeated - by_chance > 0.5 * (1 - by_chance):
            tally["files", "most lines in files before it"] += 1
            continue
        num_set += np.count_nonzero((seen[byte] & bit) == 0)
        np.bitwise_or.at(seen, byte, bit)
        tally["files", READ] += 1
        yield file


def _line_hashes(path: str) -> np.ndarray | None:
    """Return the bits of the long lines, each once, or that of the whole file if it has none; None unless it is UTF-8
    without NUL."""
    hashes, whole = array("I"), 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                if "\0" in line:
                    return None
                whole = zlib.crc32(line.encode(), whole)
                if len(line := line.strip().encode()) >= _MIN_LINE_BYTES:
                    hashes.append(zlib.crc32(line))
    except UnicodeDecodeError:
        return None
    return np.unique(np.array(hashes or [whole], np.uint32) % (8 * _SEEN_BYTES))
