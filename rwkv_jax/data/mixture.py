"""Several corpora by weight: `a.txt:0.7,b.txt:0.3` where one source is expected.

Weights are shares of the training windows, in any unit: `7` and `3` say the same. Each part keeps its own splits.
"""

import hashlib
import json
import os
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from rwkv_jax import data, files

_PART = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


class Mixture(NamedTuple):
    """One corpus, or several with weights."""

    name: str
    tokenizer: str
    vocab_size: int
    sha256: str  # a lone corpus' own; of several, of theirs and the weights
    parts: tuple[data.Corpus, ...]
    weights: tuple[Fraction, ...]  # sum 1

    @property
    def train(self) -> list:
        """Argument of `batches.dataset`: each part's training split with its weight."""
        return [(part.train, weight) for part, weight in zip(self.parts, self.weights, strict=True)]

    def held_out(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The first tokens of the validation splits, and which of them count: from each part its share of
        `num_tokens` (fewer if it has no more), one after the other, so that their loss is that of the mixture."""
        pieces = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            tokens, mask = part.valid.tokens[: round(num_tokens * weight)], part.valid.mask
            pieces.append((tokens, np.ones(len(tokens), bool) if mask is None else mask[: len(tokens)] != 0))
        if len(pieces) == 1:
            return pieces[0]
        return tuple(np.concatenate(piece) for piece in zip(*pieces, strict=True))


def prepare(source: str, tokenizer: str = "bytes", **fields: str) -> Mixture:
    """The tokens of `source`: what `data.prepare` takes, or several of these as SOURCE:WEIGHT,SOURCE:WEIGHT.
    `fields`, the text and prompt of JSONL, are those of all.

    Raises:
        ValueError: a part without a weight above 0, or a tokenizer that each part would make its own of.
    """
    sources = [source] if os.path.exists(files.user_path(source)) else source.split(",")
    matches = [_PART.fullmatch(part) for part in sources]
    if len(sources) == 1 or not any(matches):
        corpus = data.prepare(source, tokenizer, **fields)
        return Mixture(corpus.name, corpus.tokenizer, corpus.vocab_size, corpus.sha256, (corpus,), (Fraction(1),))
    for part, match in zip(sources, matches, strict=True):
        if match is None or float(match[2]) == 0:
            raise ValueError(f"corpus part {part!r} has no weight above 0, expected SOURCE:WEIGHT,SOURCE:WEIGHT")
    if tokenizer == "characters":
        raise ValueError("tokenizer is 'characters', expected one that does not depend on the corpus of a mixture")
    parts = tuple(data.prepare(match[1].strip(), tokenizer, **fields) for match in matches)
    total = sum(Fraction(match[2]) for match in matches)
    weights = tuple(Fraction(match[2]) / total for match in matches)
    digest = hashlib.sha256(
        json.dumps([[part.sha256, str(w)] for part, w in zip(parts, weights, strict=True)]).encode()
    )
    name = ",".join(f"{part.name}:{match[2]}" for part, match in zip(parts, matches, strict=True))
    vocab_size = max(part.vocab_size for part in parts)
    return Mixture(name, parts[0].tokenizer, vocab_size, digest.hexdigest(), parts, weights)
