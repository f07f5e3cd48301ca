"""The orders in which training reads a token file.

    shuffled     window i is the T + 1 tokens from i·T on, so that no target belongs to two windows. Each epoch visits
                 all windows once, in its own order.
    released     the same windows in the order of the released training code: sample n = 1, 2, ... is window
                 f·n³ mod p, p the largest prime that is 2 mod 3 and at most the number of windows, f = ⌊p(√5-1)/2⌋.
                 A permutation of p windows, the same in each epoch, whatever the seed.
    packed       each window holds as many whole documents as fit into T, in sequence, the rest masked; longer ones
                 are cut. Windows are shuffled as above.
    documents    each epoch concatenates all documents in its own order and cuts the result into B equal parts. Row r
                 reads part r from its beginning to its end, T tokens a step, so that state can be carried.

Samples are numbered 0, 1, 2, ... without end. An order maps a text to a function from sample numbers to the positions
of their tokens, which needs no earlier sample.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import grain
import numpy as np
from tqdm import tqdm


class Text(NamedTuple):
    tokens: np.ndarray  # [N] integers >= 0; int32 in Megatron files of large vocabularies
    starts: np.ndarray  # [documents] where each begins
    mask: np.ndarray | None  # [N] whether a token counts as a target; None: all do


class Rows(NamedTuple):
    at: np.ndarray  # [rows, T+1] where their tokens are
    counts: np.ndarray  # [rows, T] False for padding
    reset: np.ndarray | None  # [rows, T]


def _windows(text: Text, seq_len: int) -> int:
    num_windows = (len(text.tokens) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(f"corpus has {len(text.tokens)} tokens: shorter than one window of {seq_len + 1}")
    return num_windows


def _window_rows(windows, seq_len: int) -> Rows:
    at = np.array(windows, np.int64)[:, None] * seq_len + np.arange(seq_len + 1)
    return Rows(at, np.ones((len(at), seq_len), bool), None)


def _shuffled(text: Text, seq_len: int, rows: int, seed: int):
    windows = grain.MapDataset.range(_windows(text, seq_len)).seed(seed).shuffle().repeat()
    return lambda numbers: _window_rows([windows[int(i)] for i in numbers], seq_len)


def _released(text: Text, seq_len: int, rows: int, seed: int):
    """Follow RWKV-LM, RWKV-v4neo/src/dataset.py, in Python's integers: f·n³ reaches 7e33 within the Pile."""
    prime = next((p for p in range(_windows(text, seq_len), 1, -1) if p % 3 == 2 and _is_prime(p)), None)
    if prime is None:
        raise ValueError(f"corpus has {len(text.tokens)} tokens: expected two windows of {seq_len} and one more")
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return lambda numbers: _window_rows([factor * (int(i) + 1) ** 3 % prime for i in numbers], seq_len)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _packed(text: Text, seq_len: int, rows: int, seed: int):
    begins, ends = _packs(text, seq_len)
    order = grain.MapDataset.range(len(begins)).seed(seed).shuffle().repeat()

    def sample(numbers) -> Rows:
        packs = [order[int(i)] for i in numbers]
        begin_B1, end_B1 = begins[packs, None], ends[packs, None]
        at = np.minimum(begin_B1 + np.arange(seq_len + 1), end_B1)
        counts = np.arange(seq_len) < end_B1 - begin_B1
        return Rows(at, counts, _is_start(text, at[:, :-1]) & counts)

    return sample


def _packs(text: Text, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first input and the last target of each window; the latter is the next window's first input."""
    last = len(text.tokens) - 1
    if last < 1:
        raise ValueError(f"corpus has {last + 1} tokens, expected at least 2")
    bounds, cuts = [*text.starts.tolist(), last], [0]
    with tqdm(desc="packing", total=last, unit="token", unit_scale=True, leave=False, disable=None) as bar:
        while cuts[-1] < last:
            limit = min(cuts[-1] + seq_len, last)
            bound = bounds[bisect_right(bounds, limit) - 1]
            cuts.append(bound if bound > cuts[-1] else limit)
            bar.update(cuts[-1] - cuts[-2])
    return np.array(cuts[:-1]), np.array(cuts[1:])


def _is_start(text: Text, at: np.ndarray) -> np.ndarray:
    return text.starts[np.searchsorted(text.starts, at, side="right") - 1] == at


def _documents(text: Text, seq_len: int, rows: int, seed: int):
    num_tokens = len(text.tokens)
    steps = (num_tokens - 1) // (rows * seq_len)  # of an epoch
    if steps < 1:
        raise ValueError(f"corpus has {num_tokens} tokens: shorter than {rows} rows of {seq_len} and one more")
    lengths = np.diff(text.starts, append=num_tokens)

    @functools.lru_cache(2)
    def line(epoch: int):
        """Return where each document ends in the epoch's sequence, and its offset from there to the file."""
        # raw bits, which NumPy promises to keep the same across versions
        draws = np.random.Philox(key=[seed, epoch]).random_raw(len(lengths))
        order = np.argsort(draws, kind="stable")
        ends = np.cumsum(lengths[order])
        return ends, text.starts[order] + lengths[order] - ends

    def sample(numbers) -> Rows:
        epoch, step = divmod(int(numbers[0]) // rows, steps)
        ends, shifts = line(epoch)
        at = ((numbers % rows * steps + step) * seq_len)[:, None] + np.arange(seq_len + 1)
        at = at + shifts[np.searchsorted(ends, at, side="right")]
        reset = _is_start(text, at[:, :-1])
        reset[:, 0] |= step == 0
        return Rows(at, np.ones_like(reset), reset)

    return sample


# (text, seq_len, rows of the batch, seed) -> numbers of samples -> rows
ORDERS: dict[str, Callable] = {
    "shuffled": _shuffled,
    "released": _released,
    "packed": _packed,
    "documents": _documents,
}
