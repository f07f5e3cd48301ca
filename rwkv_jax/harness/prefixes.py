"""Contexts of many texts that share prefixes: each prefix is read once, and its state is forked.

Few-shot questions share their examples, and questions about a passage share the passage. For RWKV a fork costs one
state, whose size does not depend on the length of the prefix.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from rwkv_jax.generate.context import Context, begin, concatenate, rows
from rwkv_jax.generate.decode import read
from rwkv_jax.models import per_layer

SHARED = 32  # prefixes are cut to a multiple of this: a separate read of fewer tokens costs more than it saves


def read_many(model, params, texts: Sequence[Sequence[int]], batch_size: int) -> Context:
    """Return one context with the rows of all N texts, in their order.

    Texts are read `batch_size` at a time, those of similar length together; the last one pads the last batch. A
    shared prefix of at least `SHARED` tokens is read once, and so are prefixes of prefixes.

    Args:
        texts: lists of ids in [0, V), at least one token each.
    """
    if not texts or min(map(len, texts)) == 0:
        raise ValueError("nothing to read in an empty text, expected texts of at least one token")
    model, params = per_layer(model, params)
    keys = [tuple(map(int, text)) for text in texts]
    unique = sorted(set(keys))
    row_of = {key: row for row, key in enumerate(unique)}
    return rows(_read_sorted(model, params, unique, batch_size), [row_of[key] for key in keys])


def _read_sorted(model, params, texts: list[tuple], batch_size: int) -> Context:
    stems = shared_prefixes(texts)
    before, row_of = begin(model, None, 1, 1), {(): 0}
    if longer := sorted(set(stems) - {()}):
        before = concatenate([before, _read_sorted(model, params, longer, batch_size)])
        row_of |= {stem: row for row, stem in enumerate(longer, 1)}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]) - len(stems[i]))
    read_so_far = []
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        filled = batch + batch[-1:] * (batch_size - len(batch))
        context = rows(before, [row_of[stems[i]] for i in filled])
        context = read(model, params, [texts[i][len(stems[i]) :] for i in filled], context)
        read_so_far.append(rows(context, slice(len(batch))))
    return rows(concatenate(read_so_far), np.argsort(order))


def shared_prefixes(texts: list[tuple]) -> list[tuple]:
    """Return the longest prefix that each of these sorted texts shares with another, cut to a multiple of `SHARED`."""
    with_next = [0, *itertools.starmap(_shared_length, itertools.pairwise(texts)), 0]
    lengths = [max(pair) // SHARED * SHARED for pair in itertools.pairwise(with_next)]
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def _shared_length(a: tuple, b: tuple) -> int:
    """Return the length of the common prefix of two texts."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
