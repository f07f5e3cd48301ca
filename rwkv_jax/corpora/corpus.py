"""What a corpus is: documents before they are tokens, and splits of tokens after."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

SEPARATOR = 0
SPLITS = ("train", "valid", "test")


class Split(NamedTuple):
    """Documents one after another; document i is tokens[starts[i] : starts[i + 1]], separator included.

    Where the tokens are a file of somebody else's, a document that nothing precedes has no separator.
    """

    tokens: np.ndarray  # [tokens] read-only memory map of integers
    starts: np.ndarray  # [documents] int64, where the documents' separators are
    names: tuple[str, ...]  # [documents] paths relative to the source; () where documents have no names
    num_bytes: int | None  # UTF-8 bytes of the documents, separators not counted: what bits per byte divide by;
    # None where tokens came without text
    mask: np.ndarray | None = None  # [tokens] uint8, 0 where a token is given and not to be predicted; None: no such


class Corpus(NamedTuple):
    name: str
    tokenizer: str  # what `get_tokenizer` takes
    vocab_size: int
    sha256: str  # of the tokens, their type, the bounds of splits and documents, and the tokenizer
    train: Split
    valid: Split
    test: Split


class Document(NamedTuple):
    """One text of a source, not yet tokens."""

    split: int  # index in SPLITS
    blocks: Iterable[bytes]  # UTF-8, not empty
    prompt: bytes = b""  # UTF-8 that comes before the text and is not to be predicted
    name: str = ""


class Source(NamedTuple):
    name: str
    identity: list  # JSON values that change when the documents do
    num_bytes: int | None  # about, for progress
    documents: Callable[[], Iterator[Document]]
    has_prompts: bool = False


def splitter(absent=(1, 2)) -> Callable[[bytes], int]:
    """What a document is identified by -> its split: train, or one of those that the source does not come with.

    One document in 20 goes to each of these, by hash, so that copies land in one split; and of the first distinct
    ones one each, so that a small source has all splits.
    """
    first = {}

    def split(key: bytes) -> int:
        digest = hashlib.sha256(key).digest()
        if len(first) <= len(absent):
            first.setdefault(digest, (0, *absent)[len(first)])
        twentieth = int.from_bytes(digest[:8]) % 20
        return first.get(digest, absent[twentieth] if twentieth < len(absent) else 0)

    return split
