"""Weighted mixtures of corpora: `a.txt:0.7,b.txt:0.3` in place of one source.

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
from rwkv_jax.data import build

_PART = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


class Mixture(NamedTuple):
    """One corpus, or several with weights."""

    name: str
    tokenizer: str
    vocab_size: int
    sha256: str  # of one corpus, its own; of several, of their digests and weights
    parts: tuple[data.Corpus, ...]
    weights: tuple[Fraction, ...]  # sum 1

    @property
    def train(self) -> list:
        """Argument of `batches.dataset`: each part's training split with its weight."""
        return [(part.train, weight) for part, weight in zip(self.parts, self.weights, strict=True)]

    def held_out(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first tokens of the validation splits, and a mask of the targets among them.

        Each part gives its share of `num_tokens`, or all it has, so that the loss is that of the mixture. If no
        target is among them, as in a long prompt, it gives the tokens around its first target.

        Raises:
            ValueError: no token of the validation splits counts.
        """
        shares = zip(self.parts, self.weights, strict=True)
        pieces = [_held_out(part.valid, round(num_tokens * weight)) for part, weight in shares]
        tokens, counts = pieces[0] if len(pieces) == 1 else map(np.concatenate, zip(*pieces, strict=True))
        if not counts[1:].any():
            raise ValueError(
                f"validation text of {self.name} has no target, expected some; eval_tokens=0 trains without"
            )
        return tokens, counts


def _held_out(valid: data.Split, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    if valid.mask is None:
        tokens = valid.tokens[:num_tokens]
        return tokens, np.ones(len(tokens), bool)
    counts = valid.mask != 0
    first = 1 + int(np.argmax(counts[1:]))  # the first token of all is not predicted
    begin = 0 if first < num_tokens else first - num_tokens // 2
    piece = slice(begin, begin + num_tokens)
    return valid.tokens[piece], counts[piece]


def prepare(source: str, tokenizer: str = "bytes", **fields: str) -> Mixture:
    """Return the tokens of `source`: one for `data.prepare`, or several as SOURCE:WEIGHT,SOURCE:WEIGHT.

    `fields`, text and prompt, apply to all parts that are JSONL.

    Raises:
        ValueError: a part without a weight above 0, or a tokenizer that depends on the corpus.
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
    sources = [match[1].strip() for match in matches]
    # where no part has fields, all get them and the first refuses them
    with_fields = [source for source in sources if build.has_fields(source, **fields)] or sources
    parts = tuple(data.prepare(s, tokenizer, **(fields if s in with_fields else {})) for s in sources)
    total = sum(Fraction(match[2]) for match in matches)
    weights = tuple(Fraction(match[2]) / total for match in matches)
    digest = hashlib.sha256(
        json.dumps([[part.sha256, str(w)] for part, w in zip(parts, weights, strict=True)]).encode()
    )
    name = ",".join(f"{part.name}:{match[2]}" for part, match in zip(parts, matches, strict=True))
    vocab_size = max(part.vocab_size for part in parts)
    return Mixture(name, parts[0].tokenizer, vocab_size, digest.hexdigest(), parts, weights)
