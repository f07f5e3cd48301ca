"""Public corpora by name, downloaded once to `<cache>/downloads/<name>`, with their usual splits.

    enwik8         first 100 MB of Wikipedia's XML of 2006: 90, 5 and 5 MB. CC BY-SA and GFDL
    text8          the same reduced to a-z and space: 90, 5 and 5 MB
    wikitext-103   raw (no <unk>), each of the published three files as one document. CC BY-SA
    tinystories    GPT-4's, a document a story; validation as published, test a twentieth of train. CDLA-Sharing-1.0

The SHA-256 digests are those that public repositories agree on (enwik8, text8: DataDeps users and compression
benchmarks; wikitext-103: CorpusLoaders.jl; tinystories: Git LFS of the hub at this revision). The wikitext archive's
first home is gone; the URL is a copy with the same digest. These URLs were not tried where this file was written.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.data import cache
from rwkv_jax.data import text as texts
from rwkv_jax.data.corpus import Document, Source, splitter

_SECONDS = 30  # without a byte
_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
_WIKITEXT = (
    "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738/"
)
_STORY_END = b"<|endoftext|>"

# URL -> SHA-256, for each corpus
NAMED = {
    "enwik8": {
        "https://mattmahoney.net/dc/enwik8.zip": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    },
    "text8": {
        "https://mattmahoney.net/dc/text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    },
    "wikitext-103": {
        _WIKITEXT + "wikitext-103-raw-v1.zip": "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    },
    "tinystories": {
        _STORIES + "TinyStoriesV2-GPT4-train.txt": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        _STORIES + "TinyStoriesV2-GPT4-valid.txt": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
    },
}


def source(name: str, exact: bool) -> Source:
    """Source for a name in NAMED, which is downloaded when its documents are first read.

    Args:
        exact: allows a cut inside a character.
    """
    identity = [name, list(NAMED[name].values())]
    return Source(name, identity, None, lambda: _documents(name, exact), Counter())


def _documents(name: str, exact: bool) -> Iterator[Document]:
    folder = cache.cache_dir() / "downloads" / name
    cache.made(folder, lambda partial: _download(name, partial))
    match name:
        case "enwik8" | "text8":
            yield from texts.source(str(folder / name), exact).documents()
        case "wikitext-103":
            for split, part in enumerate(("train", "valid", "test")):
                file = folder / "wikitext-103-raw" / f"wiki.{part}.raw"
                yield Document(split, texts.blocks(file), name=file.name)
        case "tinystories":
            train, valid = (folder / _file_name(url) for url in NAMED[name])
            split_of = splitter([2])
            for story in _stories(train):
                yield Document(split_of(story), [story])
            for story in _stories(valid):
                yield Document(1, [story])


def _download(name: str, folder: Path) -> dict:
    """Fill the folder with the files of a corpus, archives unpacked.

    Raises:
        OSError: no network, or an incomplete transfer.
        ValueError: a file with another digest.
    """
    import pooch  # here, because the import takes 0.15 s

    for url, sha256 in NAMED[name].items():
        file = _file_name(url)
        unpack = pooch.Unzip(extract_dir=".") if file.endswith(".zip") else None
        downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=_SECONDS)
        try:
            pooch.retrieve(url, f"sha256:{sha256}", file, folder, processor=unpack, downloader=downloader)
        except OSError as error:
            raise OSError(
                f"cannot download {url}: {error}; for a machine without a network, copy the folder "
                f"{folder.with_suffix('')} from one that has it"
            ) from None
    return {}


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _stories(file: Path) -> Iterator[bytes]:
    rest = b""
    for block in texts.blocks(file):
        *stories, rest = (rest + block).split(_STORY_END)
        yield from filter(None, map(bytes.strip, stories))
    if rest.strip():
        yield rest.strip()
