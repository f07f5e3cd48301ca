"""Files of a path, and their formats, detected from the content because names are unreliable.

Links are never resolved here: a hub's cache names files by hash, and only the name of the link has the suffix.
"""

import bz2
import codecs
import gzip
import lzma
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from rwkv_jax import files

_DECOMPRESS, _UNPACK = "decompress it first", "unpack it first"
# First bytes -> format, and the remedy that the error message names.
_PACKED = {
    b"\x1f\x8b": ("gzip", _DECOMPRESS),
    b"BZh": ("bzip2", _DECOMPRESS),
    b"\xfd7zXZ\0": ("xz", _DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ("zstd", _DECOMPRESS),
    b"\x04\x22\x4d\x18": ("lz4", _DECOMPRESS),
    b"PK\x03\x04": ("zip", _UNPACK),
    b"\x1f\x9d": ("compress", _DECOMPRESS),
    b"LZIP\x01": ("lzip", _DECOMPRESS),
    b"]\0\0": ("lzma", _DECOMPRESS),
    b"7z\xbc\xaf\x27\x1c": ("7z", _UNPACK),
    b"Rar!\x1a\x07": ("rar", _UNPACK),
    b"%PDF-": ("pdf", "extract its text first"),
    b"PAR1\x15": ("parquet", "hf:FOLDER reads the parquet files of a folder"),
    b"ARROW1\0\0": ("arrow", "hf:FOLDER reads the arrow files of a folder"),
}
_TAR, _TAR_AT = b"ustar", 257
_OPENERS = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what these raise for damaged files
_HEAD_BYTES, _MAX_LINE_BYTES = 1 << 12, 1 << 24


def absolute(path: Path) -> Path:
    """Return the absolute path that identifies a corpus; links keep their names, and only a last `..` is resolved."""
    return path.resolve() if path.name == ".." else path.absolute()


def visible(folder: Path, tally: Counter) -> list[tuple[str, Path]]:
    """Return relative names and paths, sorted, of the files in a folder and its subfolders.

    Hidden files and folders, linked folders, empty files and special files are left out and counted in `tally`.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        tally["files", "hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        tally["files", "linked folder, not followed"] += sum(
            os.path.islink(os.path.join(parent, name)) for name in folders
        )
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if not path.is_file():
                tally["files", "neither file nor folder"] += 1
            elif not path.stat().st_size:
                tally["files", "empty"] += 1
            else:
                found.append((path.relative_to(folder).as_posix(), path))
    return sorted(found)


def _raise(error: OSError):
    raise error


def packing(path: Path) -> str | None:
    """Return the format of a compressed file or an archive, None for others."""
    found = _packed(_head(path))
    return found and found[0]


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_TAR_AT + len(_TAR))


def _packed(head: bytes) -> tuple[str, str] | None:
    if head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR and b"\0" in head:
        return "tar", _UNPACK
    if head.startswith(b"BZh") and head[4:10] != b"1AY&SY":  # a text may begin with these three letters
        return None
    return next((found for magic, found in _PACKED.items() if head.startswith(magic)), None)


def expect_plain(path: Path, head: bytes | None = None) -> None:
    """Raise ValueError for a compressed file or an archive, detected from its first bytes.

    A pipe is not read here: its reader passes the first bytes as `head`.
    """
    head = _head(path) if head is None and path.is_file() else head
    if head and (found := _packed(head)):
        raise ValueError(f"{path} is {found[0]}, not text: {found[1]}")


def opened(path: Path) -> BinaryIO:
    """Open a file of JSON lines, decompressed; ValueError for a compression that Python lacks."""
    kind = packing(path)
    if kind not in (None, *_OPENERS):
        expect_plain(path)
    return _OPENERS.get(kind, open)(path, "rb")


def is_json_lines(path: Path) -> bool:
    """Return whether the suffix says JSON lines, or the first two lines, decompressed, are objects."""
    if {".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes}:
        return True
    kind = packing(path)
    if kind not in (None, *_OPENERS):
        return False
    try:
        with _OPENERS.get(kind, open)(path, "rb") as file:
            if not file.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
                return False
            file.seek(0)
            lines = (line for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b"") if line.strip())
            files.parse_json(next(lines, b""))
            return next(lines, b"").lstrip().startswith(b"{")
    except (ValueError, *DAMAGED):
        return False
