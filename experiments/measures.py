"""Measures of a trained model: functions (model, params, corpus) -> numbers, which `experiments.study` takes by name.

A measure's main number has the measure's name; lower is better. If a measure also returns NAME_nats and NAME_bytes,
the nats and bytes of each document, intervals are over documents as well.
"""

from typing import NamedTuple

import numpy as np

from rwkv_jax import data, evaluate


class HeldOut(NamedTuple):
    """Held-out text to measure a model on, and the shape of its training batches."""

    valid: data.Split
    test: data.Split
    seq_len: int
    batch_size: int


def held_out(config, tokens: int) -> HeldOut:
    """Return the beginnings of all held-out documents of a run's corpus, at most `tokens` tokens of each split."""
    corpus = data.prepare(config.corpus, config.tokenizer)
    return HeldOut(capped(corpus.valid, tokens), capped(corpus.test, tokens), config.seq_len, config.batch_size)


def capped(split: data.Split, max_tokens: int) -> data.Split:
    """Return the beginnings of a split's documents, together at most `max_tokens` tokens.

    More documents give a tighter interval than more of each document.
    """
    lengths = np.diff(split.starts, append=len(split.tokens))[: max(1, max_tokens // 64)]
    longest, too_long = 2, lengths.max() + 1
    while too_long - longest > 1:
        middle = (longest + too_long) // 2
        fits = np.minimum(lengths, middle).sum() <= max_tokens
        longest, too_long = (middle, too_long) if fits else (longest, middle)
    kept = np.minimum(lengths, longest)
    tokens = np.concatenate([split.tokens[start : start + n] for start, n in zip(split.starts, kept, strict=False)])
    starts = np.cumsum(kept) - kept
    return split._replace(tokens=tokens, starts=starts, num_bytes=len(tokens) - len(starts))


def level(nats_N: np.ndarray, split: data.Split) -> float:
    """Return the bits per byte of a split of bytes, from nats aligned with its tokens."""
    return evaluate.bits_per_byte(*evaluate.per_document(nats_N, split))


def bits_per_byte(model, params, corpus: HeldOut) -> dict:
    """Bits per byte in disjoint windows of the training length, each from an empty past, for every model."""
    shape = (corpus.seq_len, corpus.batch_size)
    valid_N = evaluate.windows(model, params, corpus.valid.tokens, *shape)
    nats_N = evaluate.windows(model, params, corpus.test.tokens, *shape)
    numbers = {"valid_bits_per_byte": round(level(valid_N, corpus.valid), 5)}
    return numbers | by_document("bits_per_byte", nats_N, corpus.test)


def best_practice(model, params, corpus: HeldOut) -> dict:
    """Bits per byte at best practice: the state carried over whole documents, else windows half a length apart."""
    test = corpus.test
    nats_N = evaluate.best_practice(model, params, test.tokens, test.starts, corpus.seq_len, corpus.batch_size)
    return by_document("best_practice", nats_N, test)


def by_document(name: str, nats_N, split) -> dict:
    """Return bits per byte as a measure called `name` returns them, from nats aligned with the tokens of a split."""
    nats_D, bytes_D = evaluate.per_document(nats_N, split)
    return {
        name: round(level(nats_N, split), 5),
        f"{name}_nats": nats_D.round(3).tolist(),
        f"{name}_bytes": bytes_D.astype(int).tolist(),
    }


def nats_per_token(model, params, corpus: HeldOut) -> dict:
    """Mean loss per token in windows of the training length, without separators."""

    def nats(split) -> float:
        nats_N = evaluate.windows(model, params, split.tokens, corpus.seq_len, corpus.batch_size)
        return round(float(np.delete(nats_N, split.starts).mean(dtype=np.float64)), 5)

    return {"nats_per_token": nats(corpus.test), "valid_nats_per_token": nats(corpus.valid)}
