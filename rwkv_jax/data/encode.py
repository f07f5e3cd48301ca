"""Documents -> tokens, piece by piece."""

from collections.abc import Iterable, Iterator
from itertools import tee
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rwkv_jax.data.corpus import Document, Source
from rwkv_jax.data.tokenizers import Tokenizer, pieces


class Piece(NamedTuple):
    """Part of a document, cut where no token spans the cut."""

    document: Document
    document_number: int  # from 0
    is_prompt: bool
    text: bytes


def encode(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yield each piece with its tokens, in order, and show progress.

    The tokenizer reads several pieces ahead and encodes them in parallel.
    """
    cut, ahead = tee(_cut(source.documents(), tokenizer))
    encoded = tokenizer.encode_documents([piece.text] for piece in ahead)
    with tqdm(desc="tokens", total=source.num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for piece, (_, tokens) in zip(cut, encoded, strict=True):
            bar.update(len(piece.text))
            yield piece, tokens


def _cut(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Piece]:
    for number, document in enumerate(documents):
        for is_prompt, blocks in ((True, [document.prompt]), (False, document.blocks)):
            for text in pieces(tokenizer, filter(None, blocks)):
                yield Piece(document, number, is_prompt, text)
