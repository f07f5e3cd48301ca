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
    tokens: np.ndarray, *, seq_len: int, batch_size: int, seed: int, host: int = 0, hosts: int = 1
) -> grain.MapDataset:
    """`ds[step]` is the batch of that step, or this host's rows of it.

    Args:
        tokens: [tokens] unsigned integers, memory-mapped or not.
        seq_len: T.
        batch_size: B of all hosts together. The stream of windows does not depend on `hosts`: host p has rows p,
            p + hosts, p + 2·hosts, ... of the global batch.
        seed: of the order of the windows, in [0, 2³²).

    Raises:
        ValueError: fewer tokens than one window, or a batch that the hosts cannot share equally.
    """
    if min(seq_len, batch_size) < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}: both must be at least 1")
    if not 0 <= host < hosts:
        raise ValueError(f"host is {host}: expected 0 to {hosts - 1}, for hosts={hosts}")
    if batch_size % hosts:
        raise ValueError(f"batch_size is {batch_size}: expected a multiple of the number of hosts, {hosts}")
    num_windows = (len(tokens) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(f"corpus has {len(tokens)} tokens: shorter than one window of {seq_len + 1}")
    tokens = np.asarray(tokens)

    def gather(windows: np.ndarray) -> Batch:
        return {
            "tokens": tokens[windows[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int32),
            "mask": np.ones((len(windows), seq_len), bool),
        }

    windows = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat()
    return windows[host::hosts].batch(batch_size // hosts).map(gather)


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
