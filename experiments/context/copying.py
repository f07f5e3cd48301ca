"""Long-range copying: a model repeats a symbol after a number of other symbols, the lag.

x x x STORE a x x x x x ASK a        x, a: any of the same symbols; lag 6, from a to ASK

    python -m experiments.context.copying             learning rate of each version of RWKV -> sweep.json
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rwkv_jax
from experiments import sweeps, tasks

SWEEP = Path(__file__).with_name("sweep.json")

STORE, ASK = 0, 1
SYMBOLS = 32
VOCAB_SIZE = 2 + SYMBOLS
NUM_LAYERS, DIM = 2, 64
VERSIONS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")


def batch(lag_B, seq_len: int, rng) -> dict:
    """Return rows of `seq_len` tokens that end with ASK; only the answer counts.

    Args:
        lag_B: lag of each row, 1 to seq_len - 2.
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
    """Training of the task: windows of one length, then stages (factor of that length, steps of as many symbols)."""

    seq_len: int = 64
    batch_size: int = 64
    steps: int = 300
    stages: tuple = ((2, 9), (4, 90), (8, 90))
    lags: tuple = (8, 16, 32, 64, 128, 256, 512, 1024)
    lr: float | None = None  # None: the best of sweep.json


TASK = Task()


def stage_batches(task: Task, stages, seed: int):
    """Return batches by step, all with the same number of tokens, in windows of the step's stage."""
    ends = np.cumsum([steps for _, steps in stages])

    def batch_of(step: int) -> dict:
        factor = stages[int(np.searchsorted(ends, step, side="right"))][0]
        rng, seq_len = np.random.default_rng([seed, step]), factor * task.seq_len
        return batch(rng.integers(1, seq_len - 1, task.batch_size // factor), seq_len, rng)

    return batch_of


def model_of(name: str):
    return rwkv_jax.build(name, vocab_size=VOCAB_SIZE, num_layers=NUM_LAYERS, dim=DIM)


@cache
def first_stage(task: Task, name: str, seed: int):
    """Return the parameters after windows of the task's own length, from the initialisers."""
    batches = stage_batches(task, ((1, task.steps),), seed)
    return tasks.fit(model_of(name), batches, lr=task.lr, steps=task.steps, seed=seed)[0]


def learn(task: Task, name: str, seed: int, more, config, folder) -> dict:
    """Return the share of symbols copied, by lag, after the first stage and the stages `more`."""
    model, params, steps = model_of(name), first_stage(task, name, seed), sum(steps for _, steps in more)
    if more:
        batches = stage_batches(task, more, seed + 1)
        params, _ = tasks.fit(model, batches, lr=task.lr, steps=steps, seed=seed + 1, params=params)
    asked = lambda lag, rows=256: batch(np.full(rows, lag), lag + 2, np.random.default_rng([2**32 - 1, lag]))
    share = {str(lag): round(float(tasks.share_right(model, params, asked(lag))), 4) for lag in task.lags}
    return {"share": share, "window": max(factor for factor, _ in (*more, (1, 0))) * task.seq_len}


def at_its_rate(task: Task, name: str) -> Task:
    """Return the task with the best learning rate of the sweep, unless it has one."""
    lr = task.lr or sweeps.best(SWEEP, swept_name(name), max)
    if lr is None:
        raise ValueError(f"no learning rate of {name} in {SWEEP}: run `python -m experiments.context.copying`")
    return task._replace(lr=lr)


def swept_name(name: str) -> str:
    return f"{name} {NUM_LAYERS}x{DIM}"


def sweep(task: Task, path: Path) -> None:
    """Sweep learning rates by the share copied in windows of training length, after a third of the steps."""
    steps = task.steps // 3  # later, many rates reach 1
    batches = stage_batches(task, ((1, steps),), seed=2)
    test = stage_batches(task._replace(batch_size=512), ((1, steps),), seed=3)(0)
    for name in VERSIONS:
        model = model_of(name)
        trained = lambda lr, model=model: tasks.fit(model, batches, lr=lr, steps=steps)[0]
        share = lambda lr, model=model, trained=trained: float(tasks.share_right(model, trained(lr), test))
        sweeps.bracket(path, swept_name(name), 4e-3, share, max, widest=7, task=task._asdict())


if __name__ == "__main__":
    sweep(TASK, SWEEP)
