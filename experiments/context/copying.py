"""Long-range copy: a symbol is to be kept over a number of other symbols, the lag, and then given back.

x x x STORE a x x x x x ASK a        x, a: any of the same symbols; lag 6, from a to ASK

    python -m experiments.context.copying             learning rates -> sweep.json
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import rwkv_jax
from experiments import stamp, tasks
from experiments.results import write_json
from rwkv_jax.files import read_json

SWEEP = Path(__file__).with_name("sweep.json")

STORE, ASK = 0, 1
SYMBOLS = 32
VOCAB_SIZE = 2 + SYMBOLS


def batch(lag_B, seq_len: int, rng) -> dict:
    """Rows of `seq_len` tokens that end with the question; only its answer counts.

    Args:
        lag_B: of each row, 1 to seq_len - 2.
    """
    B, T = len(lag_B), seq_len
    if min(lag_B) < 1 or max(lag_B) > T - 2:
        raise ValueError(f"lags are {min(lag_B)} to {max(lag_B)}, expected 1 to {T - 2} in {T} tokens")
    tokens = rng.integers(2, VOCAB_SIZE, (B, T + 1), dtype=np.int32)
    row_B = np.arange(B)
    tokens[row_B, T - 2 - lag_B] = STORE
    tokens[:, T - 1] = ASK
    tokens[:, T] = tokens[row_B, T - 1 - lag_B]
    return {"tokens": tokens, "mask": np.broadcast_to(np.arange(T) == T - 1, (B, T))}


class Task(NamedTuple):
    """Fields of the training: windows of one length, then stages (factor of that length, steps of as many symbols)."""

    seq_len: int = 64
    batch_size: int = 64
    steps: int = 300
    stages: tuple = ((2, 9), (4, 90), (8, 90))
    lags: tuple = (8, 16, 32, 64, 128, 256, 512, 1024)
    lr: float | None = None  # None: the best of sweep.json


TASK = Task()


def stage_batches(task: Task, stages, seed: int):
    """Batches by step: as many tokens in each, in windows of the stage that the step is in."""
    ends = np.cumsum([steps for _, steps in stages])

    def batch_of(step: int) -> dict:
        factor = stages[int(np.searchsorted(ends, step, side="right"))][0]
        rng, seq_len = np.random.default_rng([seed, step]), factor * task.seq_len
        return batch(rng.integers(1, seq_len - 1, task.batch_size // factor), seq_len, rng)

    return batch_of


def model_of():
    return rwkv_jax.build("rwkv4", vocab_size=VOCAB_SIZE, num_layers=2, dim=64)


@cache
def first_stage(task: Task):
    """Parameters after windows of the task's own length, from the initialisers."""
    batches = stage_batches(task, ((1, task.steps),), seed=0)
    return tasks.fit(model_of(), batches, lr=rate(task), steps=task.steps, seed=0)[0]


def learn(task: Task, more, config, folder) -> dict:
    """Share of symbols given back, by lag, after the first stage and `more` stages."""
    model, params, steps = model_of(), first_stage(task), sum(steps for _, steps in more)
    if more:
        batches = stage_batches(task, more, seed=1)
        params, _ = tasks.fit(model, batches, lr=rate(task), steps=steps, seed=1, params=params)
    asked = lambda lag, rows=256: batch(np.full(rows, lag), lag + 2, np.random.default_rng([2**32 - 1, lag]))
    share = {str(lag): round(float(tasks.share_right(model, params, asked(lag))), 4) for lag in task.lags}
    return {"share": share, "window": max(factor for factor, _ in (*more, (1, 0))) * task.seq_len}


def rate(task: Task) -> float:
    if task.lr:
        return task.lr
    share = read_json(SWEEP)["share"]
    return float(max(share, key=share.get))


def sweep(task: Task, path: Path) -> None:
    """Share of symbols given back in windows of training length, by learning rate."""
    rates, steps = [2e-3, 4e-3, 8e-3, 1.6e-2], task.steps // 3  # later many are perfect
    model, batches = model_of(), stage_batches(task, ((1, steps),), 2)
    test = stage_batches(task._replace(batch_size=512), ((1, steps),), 3)(0)
    stacked, _ = tasks.fit(model, batches, lr=rates, steps=steps)
    right = lambda i: float(tasks.share_right(model, jax.tree.map(lambda x: x[i], stacked), test))
    share = {f"{lr:g}": round(right(i), 4) for i, lr in enumerate(rates)}
    write_json(path, {"share": share, "task": task._asdict(), "stamp": stamp.stamp()})


if __name__ == "__main__":
    sweep(TASK, SWEEP)
