"""Types of a corpus: documents before tokenization, and splits of tokens after it."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

SEPARATOR = 0
SPLITS = ("train", "valid", "test")


class Split(NamedTuple):
    """Concatenated documents; document i is tokens[starts[i] : starts[i + 1]], separator included.

    In a token file (`.npy`, Megatron) the first document of a split may lack the separator.
    """

    tokens: np.ndarray  # [tokens] read-only memory map of integers
    starts: np.ndarray  # [documents] int64, where the documents' separators are
    names: tuple[str, ...]  # [documents] paths relative to the source; () where documents have no names
    num_bytes: int | None  # UTF-8 bytes of the documents without separators, the divisor of bits per byte;
    # None for token files whose text is unknown
    mask: np.ndarray | None = None  # [tokens] uint8, 0 for tokens of a prompt, which are not targets; None: all are


class Corpus(NamedTuple):
    name: str
    tokenizer: str  # an argument of `get_tokenizer`
    vocab_size: int
    sha256: str  # of the tokens, their type, the bounds of splits and documents, and the tokenizer
    train: Split
    valid: Split
    test: Split


class Document(NamedTuple):
    """One text of a source before tokenization."""

    split: int  # index in SPLITS
    blocks: Iterable[bytes]  # UTF-8, not empty
    prompt: bytes = b""  # UTF-8, precedes the text and is not a target
    name: str = ""


class Source(NamedTuple):
    name: str
    identity: list  # JSON values that change when the documents do
    num_bytes: int | None  # approximate, for the progress bar
    documents: Callable[[], Iterator[Document]]
    tally: Counter  # complete once all documents were read: {("files", "empty"): 3, ("files", READ): 7}
    has_prompts: bool = False


READ = "read"


def left_out(tally: Counter, before: str) -> str:
    """Return `before`, then the number of files and objects left out, and why; "" if nothing was."""
    parts = []
    for what in dict.fromkeys(what for what, _ in tally):
        counts = {reason: count for (its, reason), count in tally.items() if its == what and count}
        total = sum(counts.values())
        if missing := total - counts.pop(READ, 0):
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
            parts.append(f"{missing:,} of {total:,} {what} ({reasons})")
    return f"{before}left out: {'; '.join(parts)}" if parts else ""


# A whole word: devices.jsonl and testimonials.jsonl name no split.
_SPLIT_NAME = re.compile(r"(?:(train)|(valid|validation|val|dev)|(test))(?:set)?(?![^\W\d_])", re.IGNORECASE)


def split_named(name: str) -> int | None:
    """Return the index in SPLITS that a file or folder is named after, None if it names no split."""
    match = _SPLIT_NAME.match(name)
    return match and match.lastindex - 1


def splitter(absent=(1, 2)) -> Callable[[bytes], int]:
    """Return a function from a document's key to its split: train, or a split that the source does not provide.

    Each absent split gets one document in 20, by hash, so that copies land in one split. The first distinct documents
    fill one split each, so that a small source has all three.
    """
    first = {}

    def split(key: bytes) -> int:
        digest = hashlib.sha256(key).digest()
        if len(first) <= len(absent):
            first.setdefault(digest, (0, *absent)[len(first)])
        twentieth = int.from_bytes(digest[:8]) % 20
        return first.get(digest, absent[twentieth] if twentieth < len(absent) else 0)

    return split
