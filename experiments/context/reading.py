"""Loss of the same bytes after contexts of several lengths.

The comparison is paired, because texts differ in difficulty far more than context helps. Each document gives one mean,
in bits a byte, so that documents can be resampled for an interval.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments import statistics
from rwkv_jax import data, evaluate

TARGET = 64  # bytes of a target
TOKENS_AT_ONCE = 2**14
score = jax.jit(evaluate.log_likelihoods, static_argnums=0)


class Targets(NamedTuple):
    text: data.Split  # the beginnings of long documents
    at_N: np.ndarray  # start of each target
    document_N: np.ndarray  # its document


def bits_after_context(model, params, corpus, T: int, contexts, number: int) -> dict:
    """Bits a byte by document: after each context, with resets every T bytes, and by best practice.

    For a model with attention, contexts end at T.
    """
    longest = max(contexts)
    its = targets(corpus.test, number, longest, 64 * T)
    told = lambda bits_N: by_document(bits_N, its)
    reset_N = evaluate.windows(model, params, its.text.tokens, T, 16)
    best_N = evaluate.best_practice(model, params, its.text.tokens, its.text.starts, T, 16)
    counts = [n for n in np.bincount(its.document_N).tolist() if n]
    after = {str(c): told(bits_after(model, params, its, c)) for c in contexts if model.recurrent or c + TARGET <= T}
    return {
        "bits_after_context": round(float(np.average(list(after.values())[-1], weights=counts)), 5),
        "targets": counts,
        "after": after,
        "reset": told(bits_of(reset_N, its)),
        "carried" if model.recurrent else "sliding": told(bits_of(best_N, its)),
        "gain_by_distance": gain_by_distance(reset_N, best_N, its.text, (T, 4 * T, 16 * T, 64 * T)),
    }


def targets(split: data.Split, number: int, context: int, longest: int) -> Targets:
    """Return at most `number` targets, spread evenly over documents, each with `context` bytes before it.

    Documents too short for that are skipped; the others are truncated to `longest` bytes.
    """
    lengths = np.diff(split.starts, append=len(split.tokens))
    long_enough = lengths > context + TARGET
    if not long_enough.any():
        raise ValueError(f"no held-out document has the {context + TARGET} bytes of a context and its target")
    starts, kept = split.starts[long_enough], np.minimum(lengths[long_enough], 1 + longest)
    tokens = np.concatenate([split.tokens[start : start + n] for start, n in zip(starts, kept, strict=True)])
    text = data.Split(tokens, np.cumsum(kept) - kept, (), len(tokens) - len(kept))
    places = [
        (at, document)
        for document, (start, n) in enumerate(zip(text.starts, kept, strict=True))
        for at in range(start + 1 + context, start + n - TARGET + 1, TARGET)
    ]
    chosen = np.linspace(0, len(places) - 1, min(number, len(places))).astype(int)
    return Targets(text, *np.array(places)[chosen].T)


def bits_after(model, params, targets: Targets, context: int) -> np.ndarray:
    """Return the bits a byte of each target [N], read from an empty past after the `context` bytes before it."""
    rows = targets.text.tokens[targets.at_N[:, None] + np.arange(-context, TARGET)]
    at_once = max(1, TOKENS_AT_ONCE // rows.shape[1])
    padded = np.pad(rows, ((0, -len(rows) % at_once), (0, 0)), mode="edge")  # one shape, one program
    parts = [score(model, params, part)[0][:, -TARGET:].mean(1) for part in np.split(padded, len(padded) // at_once)]
    return -np.concatenate(parts)[: len(rows)] / np.log(2)


def bits_of(nats_N, targets: Targets) -> np.ndarray:
    """Return the bits a byte of each target [N], from nats of an `evaluate` protocol aligned with the text."""
    return nats_N[targets.at_N[:, None] + np.arange(TARGET)].mean(1) / np.log(2)


def by_document(bits_N, targets: Targets) -> list[float]:
    """Return the mean over the targets of each document that has any."""
    counts = np.bincount(targets.document_N, minlength=len(targets.text.starts))
    sums = np.bincount(targets.document_N, bits_N, minlength=len(counts))
    return [round(float(s / n), 5) for s, n in zip(sums, counts, strict=True) if n]


def gain_by_distance(reset_N, best_N, text: data.Split, edges) -> list[list[float]]:
    """Return the bits a byte saved over resets, by document and distance.

    Distances are bytes `edges[i]` + 1 to `edges[i + 1]`. Documents that lack some of them are skipped.
    """
    gain_N = (reset_N - best_N) / np.log(2)
    lengths = np.diff(text.starts, append=len(text.tokens)) - 1
    starts = text.starts[lengths >= edges[-1]] + 1
    if len(starts) == 0:
        raise ValueError(f"no held-out document has {edges[-1]} bytes")
    mean = lambda start, low, high: round(float(gain_N[start + low : start + high].mean()), 5)
    return [[mean(start, low, high) for start in starts] for low, high in itertools.pairwise(edges)]


def bootstrap(statistic: Callable, documents: int) -> tuple[float, float, float]:
    """Return `statistic(indices of documents)` and its 95 % interval (`statistics.bootstrap`)."""
    return float(statistic(np.arange(documents))), *statistics.bootstrap(statistic, documents)


def reach(contexts, bits_C) -> float:
    """Return the bytes of context that give 95 % of what the longest context gains over the shortest.

    Between two contexts, interpolate linearly in log context.
    """
    gained_C = bits_C[0] - np.asarray(bits_C)
    wanted = 0.95 * gained_C[-1]
    i = int(np.argmax(gained_C >= wanted)) if gained_C[-1] > 0 else 0
    if i == 0:
        return float(contexts[0])
    log_low, log_high = np.log(contexts[i - 1]), np.log(contexts[i])
    return float(np.exp(log_low + (log_high - log_low) * (wanted - gained_C[i - 1]) / (gained_C[i] - gained_C[i - 1])))
