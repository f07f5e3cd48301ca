"""Training runs on text, as experiments need them: the trained model, its curve in few points, held-out text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import rwkv_jax
from rwkv_jax import checkpoint, corpora, evaluate, metrics, train


def trained(config, workdir: Path):
    """(model, params) of a run to its end, whose workdir stays. A run that is there goes on, or is done already."""
    state = train.run(config, workdir)
    if int(state.step) < config.steps:
        raise KeyboardInterrupt
    model, _ = rwkv_jax.load(workdir)
    return model, state.params


def decayed(config, budgets: Sequence[int], budget: int, folder: Path):
    """(model, params, workdirs) after `budget` steps, the last decayed: a branch of the trunk of all `budgets`.

    Equal in bits on a CPU to one run of `budget` steps with the trunk's warm-up. The trunk is a chain of stretches,
    each from one branching point to the next, so that a short budget does not wait for a long one.

    Args:
        config: of the longest budget. Its share `optim.decay` of each budget decays, by "exponential"; its warm-up is
            that of the trunk.
        folder: of `trunk-STEPS` and `STEPS`, workdirs that stay and that a later call finds. `workdirs` are those that
            led here, the branch last.
    """
    warmup, point, trunk, workdirs = round(config.optim.warmup * max(budgets)), 0, "", []
    for steps in sorted(b for b in budgets if b <= budget):
        stretch, before = config.copy_and_resolve_references(), point
        point = steps - round(config.optim.decay * steps)
        stretch.update(steps=point, branch_from=trunk)
        # its warm-up is over before the first branch
        stretch.optim.update(schedule="constant", warmup=0.0 if before else warmup / point)
        workdirs.append(folder / f"trunk-{point}")
        if point not in checkpoint.steps(workdirs[-1] / "checkpoints"):
            trained(stretch, workdirs[-1])
        trunk = str(workdirs[-1] / "checkpoints" / str(point))
    branch = config.copy_and_resolve_references()
    branch.update(steps=budget, branch_from=trunk)
    branch.optim.warmup = 0.0
    workdirs.append(folder / str(budget))
    return *trained(branch, workdirs[-1]), workdirs


def curve(workdir: Path, points: int = 40) -> dict:
    """Training loss of a run in at most `points` points, each the mean of the logged steps that it stands for."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "loss_nats" in row]
    groups = np.array_split(np.arange(len(rows)), min(points, len(rows)))
    mean = lambda name: [round(float(np.mean([rows[i][name] for i in group])), 5) for group in groups]
    return {"tokens": [rows[group[-1]]["tokens"] for group in groups], "loss_nats": mean("loss_nats")}


def capped(split: corpora.Split, max_tokens: int) -> corpora.Split:
    """The beginnings of all documents of a split, as long as `max_tokens` tokens allow: more of them make a better
    interval than more of each."""
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


def level(nats_N: np.ndarray, split: corpora.Split) -> float:
    """Bits per byte of a split of bytes, from nats aligned with its tokens."""
    return evaluate.bits_per_byte(*evaluate.per_document(nats_N, split))
