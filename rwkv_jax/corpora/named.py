"""Public corpora by name, downloaded once to `<cache>/downloads` with their usual splits.

    enwik8         first 100 MB of Wikipedia's XML of 2006: 90, 5 and 5 MB. CC BY-SA and GFDL
    text8          the same cleaned to a-z and space: 90, 5 and 5 MB
    wikitext-103   raw (no <unk>), each of the published three files as one document. CC BY-SA
    tinystories    GPT-4's, a document a story; validation as published, test a twentieth of train. CDLA-Sharing-1.0

Sizes and SHA-256 are those that public repositories agree on (enwik8, text8: DataDeps users and compression
benchmarks; wikitext-103: CorpusLoaders.jl; tinystories: Git LFS of the hub at this revision); the wikitext archive's
first home is gone, the URL is a copy with the same hash. Nothing of this was downloaded where it was written.
"""

import fcntl
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_jax.corpora import text as texts
from rwkv_jax.corpora.cache import cache_dir
from rwkv_jax.corpora.corpus import Document, Source, splitter

_BLOCK_BYTES = 1 << 20
_SECONDS = 30  # without a byte
_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
_WIKITEXT = (
    "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738/"
)
_STORY_END = b"<|endoftext|>"


class Download(NamedTuple):
    url: str
    num_bytes: int
    sha256: str


NAMED = {
    "enwik8": [
        Download(
            "https://mattmahoney.net/dc/enwik8.zip",
            36_445_475,
            "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        )
    ],
    "text8": [
        Download(
            "https://mattmahoney.net/dc/text8.zip",
            31_344_016,
            "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        )
    ],
    "wikitext-103": [
        Download(
            _WIKITEXT + "wikitext-103-raw-v1.zip",
            191_984_949,
            "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        )
    ],
    "tinystories": [
        Download(
            _STORIES + "TinyStoriesV2-GPT4-train.txt",
            2_227_753_162,
            "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        ),
        Download(
            _STORIES + "TinyStoriesV2-GPT4-valid.txt",
            22_502_601,
            "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
        ),
    ],
}


def source(name: str, exact: bool, bar) -> Source:
    """Of a name in NAMED. It is downloaded when its documents are asked for.

    Args:
        exact: whether it may be cut inside a character.
    """
    identity = [name, [download.sha256 for download in NAMED[name]]]
    return Source(name, identity, None, lambda: _documents(name, exact, bar))


def _documents(name: str, exact: bool, bar) -> Iterator[Document]:
    """
    Raises:
        OSError: no network, or a transfer that ends early; what came stays, and the next call goes on.
        ValueError: a file that is not the one expected.
    """
    files = [fetch(download, cache_dir() / "downloads", bar) for download in NAMED[name]]
    match name:
        case "enwik8" | "text8":
            yield from texts.source(str(_extract(files[0], name)), exact, bar).documents()
        case "wikitext-103":
            for split, part in enumerate(("train", "valid", "test")):
                file = _extract(files[0], f"wikitext-103-raw/wiki.{part}.raw")
                yield Document(split, texts.blocks(file), name=file.name)
        case "tinystories":
            split_of = splitter([2])
            for story in _stories(files[0]):
                yield Document(split_of(story), [story])
            for story in _stories(files[1]):
                yield Document(1, [story])


def _stories(file: Path) -> Iterator[bytes]:
    rest = b""
    for block in texts.blocks(file):
        *stories, rest = (rest + block).split(_STORY_END)
        yield from filter(None, map(bytes.strip, stories))
    if rest.strip():
        yield rest.strip()


def _extract(archive: Path, member: str) -> Path:
    target = archive.with_name(Path(member).name)
    with zipfile.ZipFile(archive) as opened:
        if not target.exists() or target.stat().st_size != opened.getinfo(member).file_size:
            partial = target.with_name(target.name + ".partial")
            with opened.open(member) as source, open(partial, "wb") as out:  # its CRC-32 is checked at the end
                shutil.copyfileobj(source, out, _BLOCK_BYTES)
            partial.rename(target)
    return target


def fetch(download: Download, folder: Path, bar) -> Path:
    """The file in `folder`, whole: as it lies there, or downloaded now, going on with what an earlier call left."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / download.url.rsplit("/", 1)[-1]
    partial = target.with_name(target.name + ".part")
    if not target.exists():
        with open(partial, "ab") as out:
            fcntl.flock(out, fcntl.LOCK_EX)  # one at a time; who waited finds it whole
            if not target.exists():
                _transfer(download, target, out, bar)
                _check(download, partial, remove=True)
                partial.rename(target)
                return target
        partial.unlink(missing_ok=True)
    _check(download, target, remove=False)
    return target


def _transfer(download: Download, target: Path, out, bar) -> None:
    """Append to `out` what it lacks, again as long as each connection brings something."""
    with bar(desc=target.name, total=download.num_bytes, unit="B", unit_scale=True) as progress:
        while (begin := out.seek(0, os.SEEK_END)) < download.num_bytes:
            progress.update(begin - progress.n)
            request = urllib.request.Request(download.url, headers={"Range": f"bytes={begin}-"} if begin else {})
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                    if begin and response.status != 206:  # a server that always begins at the beginning
                        begin = out.truncate(0)
                    while block := response.read(_BLOCK_BYTES):
                        out.write(block)
                        progress.update(len(block))
                problem = "the connection ended early"
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                problem = getattr(error, "reason", error)
            out.flush()
            if out.tell() <= begin:
                raise OSError(
                    f"cannot download {download.url}: {problem}; {begin} of {download.num_bytes} bytes are here: "
                    f"try again, or put the file at {target}"
                )


def _check(download: Download, path: Path, remove: bool) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != download.sha256:
        if remove:
            path.unlink()
        raise ValueError(
            f"{path}{', now removed,' if remove else ''} is not {download.url} as published: "
            f"SHA-256 {found}, expected {download.sha256}"
        )
