"""What a corpus is once it is tokens."""

from typing import NamedTuple

import numpy as np

SEPARATOR = 0


class Split(NamedTuple):
    """Documents one after another; document i is tokens[starts[i] : starts[i + 1]], separator included."""

    tokens: np.memmap  # [tokens] read-only; uint8, uint16 or uint32, the smallest that holds the vocabulary
    starts: np.ndarray  # [documents] int64, where the documents' separators are
    names: tuple[str, ...]  # [documents] paths relative to the source
    num_bytes: int  # UTF-8 bytes of the documents, separators not counted: what bits per byte divide by
    mask: np.memmap | None = None  # [tokens] uint8, 0 for those that are given and not to be predicted; None: no such


class Corpus(NamedTuple):
    name: str
    tokenizer: str  # what `get_tokenizer` takes
    vocab_size: int
    sha256: str  # of the tokens, their type, the bounds of splits and documents, and the tokenizer
    train: Split
    valid: Split
    test: Split
