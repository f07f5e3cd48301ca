"""Token file -> batch(step), a pure function of seed and step.

Window i of T + 1 tokens starts at token i·T, so that the T targets of one window are those of no other. Each epoch
visits all windows once, in an order of its own; batch s of the endless stream holds its windows s·B to s·B + B - 1.

A batch is a dict of `tokens` [B, T+1] int32 (inputs are tokens[:, :-1], targets tokens[:, 1:]) and `mask` [B, T]
bool, True for targets that count.
"""

import hashlib
from collections.abc import Iterator

import grain
import numpy as np

Batch = dict[str, np.ndarray]


def dataset(
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> grain.MapDataset:
    """`ds[step]` is the batch of that step, or some rows of it; no others are read.

    Args:
        tokens: [tokens] unsigned integers, memory-mapped or not.
        seq_len: T.
        batch_size: B of all hosts together.
        seed: of the order of the windows, in [0, 2³²).
        rows: which rows of the batch, in [0, B): those that this host's devices take (`parallel.rows`), so that
            the batch is the same on any number of hosts and devices. None: all.
        mask: [tokens] 0 for those that do not count as targets. None: all count.

    Raises:
        ValueError: fewer tokens than one window, or rows that no batch has.
    """
    if min(seq_len, batch_size) < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}: both must be at least 1")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if rows.size == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows are {rows.tolist()}: expected some of 0 to {batch_size - 1}")
    num_windows = (len(tokens) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(f"corpus has {len(tokens)} tokens: shorter than one window of {seq_len + 1}")
    tokens = np.asarray(tokens)

    def gather(windows: np.ndarray) -> Batch:
        at = windows[:, None] * seq_len + np.arange(seq_len + 1)
        counts = np.ones((len(windows), seq_len), bool) if mask is None else mask[at[:, 1:]] != 0
        return {"tokens": tokens[at].astype(np.int32), "mask": counts}

    windows = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat()
    return windows.batch(batch_size).map(lambda batch: gather(batch[rows]))


def read_ahead(ds: grain.MapDataset, start_step: int) -> Iterator[Batch]:
    """ds[start_step], ds[start_step + 1], ..., read by threads while the caller computes."""
    iterator = iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    iterator.set_state({"next_index": start_step})
    return iterator


def batch_hash(batch: Batch) -> str:
    """16 hexadecimal digits that tell whether two runs saw the same batch."""
    digest = hashlib.sha256()
    for name, dtype in (("tokens", np.int32), ("mask", bool)):
        array = np.ascontiguousarray(batch[name], dtype)
        digest.update(f"{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]
