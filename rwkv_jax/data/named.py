"""Public corpora by name, downloaded once to `<cache>/downloads/<name>`, with their usual splits.

    enwik8         first 100 MB of Wikipedia's XML of 2006: 90, 5 and 5 MB. CC BY-SA and GFDL
    text8          the same reduced to a-z and space: 90, 5 and 5 MB
    wikitext-103   raw (no <unk>), each of the published three files as one document. CC BY-SA
    tinystories    GPT-4's, a document a story; validation as published, test a twentieth of train. CDLA-Sharing-1.0
    classic-books  222 novels and essays in English, some translated, a document a book: 100, 7 and 5 MB. Public domain

The SHA-256 digests are those that public repositories agree on (enwik8, text8: DataDeps users and compression
benchmarks; wikitext-103: CorpusLoaders.jl; tinystories: Git LFS of the hub at this revision), for
classic-books those of its splits. The original URL of wikitext is gone; this one is a copy with the same digest.
The URLs are untested.
"""

import hashlib
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.data import cache
from rwkv_jax.data import text as texts
from rwkv_jax.data.contents import visible
from rwkv_jax.data.corpus import Document, Source, splitter

_SECONDS = 30  # without a byte
_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
_WIKITEXT = (
    "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738/"
)
_STORY_END = b"<|endoftext|>"

# Each split takes books until it has at least this many bytes. The SHA-256 is that of all its text.
_BOOKS = {
    "test": (5_000_000, "e0639e0cf2832556334e0abc29411f046abc438aeb21823577327d28294e53e0"),
    "valid": (5_000_000, "6cbb0d1a8dcd1ed5e09974d1ff4f8cbdf451563c80e4372ec79b41f8e1b86dd3"),
    "train": (100_000_000, "440b4d6dc4475678f9ffbb230170eec4bc75ede18ad29047d2b7f35db84c08ac"),
}
_BOOK_CHARACTERS = 100_000  # at least; shorter files are stories and plays
_BOOKS_COMMIT = "944882722e9a96fa6cf2739dc2ea757e101f412f"

# URL -> SHA-256, for each corpus; None where the host rebuilds the archive for each download
NAMED = {
    "classic-books": {
        f"https://codeload.github.com/mlschmitt/classic-books-markdown/zip/{_BOOKS_COMMIT}": None,
    },
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
    """Return the source of a corpus in NAMED, which is downloaded when its documents are first read.

    Args:
        exact: allows a cut inside a character.
    """
    identity = [name, *NAMED[name].values(), *(_BOOKS.values() if name == "classic-books" else ())]
    return Source(name, identity, None, lambda: _documents(name, exact), Counter())


def _documents(name: str, exact: bool) -> Iterator[Document]:
    folder = cache.cache_dir() / "downloads" / name
    cache.made(folder, lambda partial: _download(name, partial))
    match name:
        case "enwik8" | "text8":
            yield from texts.source(str(folder / name), exact).documents()
        case "classic-books":
            yield from texts.source(str(folder), exact).documents()
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
        unpack = pooch.Unzip(extract_dir=".") if "zip" in url else None
        downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=_SECONDS)
        try:
            known = sha256 and f"sha256:{sha256}"
            pooch.get_logger().setLevel("INFO" if known else "WARNING")  # at INFO it advises to record the digest
            pooch.retrieve(url, known, file, folder, processor=unpack, downloader=downloader)
        except (OSError, zipfile.BadZipFile) as error:
            raise OSError(
                f"cannot download {url}: {error}; for a machine without a network, copy the folder "
                f"{folder.with_suffix('')} from one that has it"
            ) from None
    if name == "classic-books":
        _sort_books(folder)
    return {}


def _sort_books(folder: Path) -> None:
    """Replace the folder's content by its books, train/NUMBER AUTHOR - TITLE.md and so on.

    Books are the long files, ordered by the SHA-256 of their path in the repository, with "\\n" as line break, and
    two of these at the end.

    Raises:
        ValueError: the text of a split has another digest.
    """
    files = {name.partition("/")[2]: path for name, path in visible(folder, Counter()) if name.endswith(".md")}
    # over a twentieth of all text: this book alone would fill a split
    files.pop("Samuel Richardson/Clarissa.md", None)
    by_hash = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    texts_by_name = ((name, files[name].read_bytes().replace(b"\r\n", b"\n").rstrip() + b"\n\n") for name in by_hash)
    books = enumerate(book for book in texts_by_name if len(book[1].decode()) > _BOOK_CHARACTERS)
    unsorted = list(folder.iterdir())
    for split, (at_least, sha256) in _BOOKS.items():
        found, num_bytes = hashlib.sha256(), 0
        (folder / split).mkdir()
        while num_bytes < at_least and (book := next(books, None)):
            number, (name, text) = book
            (folder / split / f"{number:03} {name.replace('/', ' - ')}").write_bytes(text)
            found.update(text)
            num_bytes += len(text)
        if found.hexdigest() != sha256:
            raise ValueError(f"SHA-256 of classic-books, {split}, is {found.hexdigest()}, expected {sha256}")
    for path in unsorted:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _stories(file: Path) -> Iterator[bytes]:
    rest = b""
    for block in texts.blocks(file):
        *stories, rest = (rest + block).split(_STORY_END)
        yield from filter(None, map(bytes.strip, stories))
    if rest.strip():
        yield rest.strip()
