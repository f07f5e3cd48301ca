"""Token file -> batch(step), a pure function of seed and step.

A batch is a dict of `tokens` [B, T+1] int32 (inputs are tokens[:, :-1], targets tokens[:, 1:]), `mask` [B, T] bool,
True for targets that count, and in the orders "packed" and "documents" `reset` [B, T] bool, True for inputs that start
a document, where the state is reset. `mask` is no `valid_BT` of a model: a prompt is read, but does not count.

Row r of the batch of step s is sample s·B + r of an endless order (`orders`), whichever host reads it.
"""

import hashlib
import math
import sys
from collections.abc import Iterator
from fractions import Fraction

import grain
import numpy as np

from rwkv_jax.data.orders import ORDERS, Rows, Text

Batch = dict[str, np.ndarray]
MAX_PERIOD = 10**6  # most samples until a mixture has exactly its shares


def dataset(
    source,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    order: str = "shuffled",
    rows: np.ndarray | None = None,
) -> grain.MapDataset:
    """Return a dataset whose item `step` is the batch of that step, or some of its rows; no others are read.

    Args:
        source: tokens [N], integers >= 0, memory-mapped or not; or a `data.Split`, with its documents and mask of
            targets; or a list of (either, weight): of every M samples, M a common denominator of the shares, each
            part has exactly its share, evenly spread. In the order "documents" a row belongs to one part.
        seq_len: T.
        batch_size: B of all hosts together.
        seed: of the order, in [0, 2³²).
        order: one of `ORDERS`.
        rows: which rows of the batch, in [0, B): those that this host's devices take (`parallel.own_rows`), so that
            the batch is the same on any number of hosts and devices. None: all.

    Raises:
        ValueError: fewer tokens than one window, rows outside the batch, or a batch that the parts cannot share.
    """
    if min(seq_len, batch_size) < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}: both must be at least 1")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if rows.size == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows are {rows.tolist()}: expected some of 0 to {batch_size - 1}")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
    parts = source if isinstance(source, list) else [(source, 1)]
    texts = [_text(split) for split, _ in parts]
    period, shares = _shares([weight for _, weight in parts])
    if order == "documents" and batch_size % period:
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of {period}: in the order 'documents' each row "
            f"belongs to one corpus, and their weights are as {':'.join(map(str, shares))}"
        )
    samples = [
        ORDERS[order](text, seq_len, batch_size * share // period, seed)
        for text, share in zip(texts, shares, strict=True)
    ]
    part_M, number_M = _spread(shares)

    def batch(step: int) -> Batch:
        periods, i = np.divmod(step * batch_size + rows, period)
        part_B, number_B = part_M[i], periods * np.array(shares)[part_M[i]] + number_M[i]
        of_parts = [np.flatnonzero(part_B == part) for part in range(len(texts))]
        pieces = [
            _gather(text, sample(number_B[of_part]))
            for text, sample, of_part in zip(texts, samples, of_parts, strict=True)
            if len(of_part)
        ]
        back = np.argsort(np.concatenate(of_parts))
        return {name: np.concatenate([piece[name] for piece in pieces])[back] for name in pieces[0]}

    return grain.MapDataset.range(sys.maxsize).map(batch)


def _text(split) -> Text:
    """Return the text of a split; a bare array of tokens is one document."""
    starts = np.asarray(getattr(split, "starts", np.zeros(1, np.int64)))
    return Text(np.asarray(getattr(split, "tokens", split)), starts, getattr(split, "mask", None))


def _shares(weights) -> tuple[int, list[int]]:
    """Return the smallest M, and the number of samples of each part among M, for weights in any unit."""
    fractions = [Fraction(str(weight)) for weight in weights]
    whole = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * whole) for fraction in fractions]
    common = math.gcd(*shares)
    period = sum(shares) // common
    if min(shares) <= 0 or period > MAX_PERIOD:
        listed = ", ".join(map(str, weights))
        raise ValueError(f"weights are {listed}: expected shares above 0 with a common denominator up to {MAX_PERIOD}")
    return period, [share // common for share in shares]


def _spread(shares) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of each of M consecutive samples [M], and its number [M] among those of its part."""
    # not grain's mixture, which rounds the weights, down to hundredths of the smallest
    due = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
    order = np.argsort(due, kind="stable")
    part = np.repeat(np.arange(len(shares)), shares)
    return part[order], np.concatenate([np.arange(share) for share in shares])[order]


def _gather(text: Text, rows: Rows) -> Batch:
    batch = {"tokens": text.tokens[rows.at].astype(np.int32), "mask": rows.counts}
    if text.mask is not None:
        batch["mask"] = rows.counts & (text.mask[rows.at[:, 1:]] != 0)
    return batch if rows.reset is None else batch | {"reset": rows.reset}


def read_ahead(ds: grain.MapDataset, start_step: int) -> Iterator[Batch]:
    """Return an iterator over ds[start_step], ds[start_step + 1], ..., prefetched by threads."""
    iterator = iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    iterator.set_state({"next_index": start_step})
    return iterator


def batch_hash(batch: Batch) -> str:
    """Return 16 hexadecimal digits that are equal if two batches are."""
    digest = hashlib.sha256()
    dtypes = {"tokens": np.int32, "mask": bool, "reset": bool}
    for name, dtype in dtypes.items():
        if name in batch:
            array = np.ascontiguousarray(batch[name], dtype)
            digest.update(f"{array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()[:16]
