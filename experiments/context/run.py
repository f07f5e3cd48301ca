"""Context: how far back a model reads, how far its state carries, and what longer training windows add (Fig. 6).

The paper's loss on the Pile falls with the context up to 2^11 tokens (Fig. 6, 7B and 14B extended to 8,192 tokens),
and section 5.2 extends windows from 1,024 to 8,192 in stages of 10, 100 and 100 billion tokens. It has no control:
another 210 billion tokens might have helped as much without longer windows. Models trained on 1,024 tokens alone hold
their loss to about 2,500 (README of the released code).

Claims, each about a small model of bytes trained here on windows of T:
  context     the same 64 bytes cost less after 4,096 bytes of context than after T
  carrying    a state carried to 64 T bytes of a text is safe, and worth what a warm window is worth
  extension   stages of 2 T, 4 T and 8 T, as 1:10:10, lower the loss after 4,096 bytes below that of a control that
              trained on as many tokens more at T
  copy        a symbol kept over generated symbols: the longest lag solved grows with extension, not with the control

    python -m experiments.context.run
    python -m experiments.context.run --preset=gpu    6 x 512, T 512, two seeds, transformers beside
    python -m experiments.context.run --sweep         learning rate of the copy task
    python -m experiments.context.run --smoke --out=DIR

Cost: 11 minutes on 2 shared cores; `gpu`, estimated: 16 minutes on one H200.

context: same sign where 4,096 bytes are better than T with the interval over documents, contradicted where worse, else
not resolved. carrying: same sign where what a carried state saves over one reset every T bytes falls by less than
0.005 bits a byte from the first bytes beyond T to the last below 64 T, with its interval; contradicted where it falls
by more, with its interval. extension: same sign, contradicted, not resolved, by the paired difference's interval over
documents, or over seeds if wider. copy: same sign where extension solves a longer lag than both start and control,
contradicted where a shorter one, else not resolved. The effective reach is the context at which 95 % of the gain from
16 to 4,096 bytes is had.

Deviations: T 256 and bytes of source code instead of 1,024 tokens of the Pile; the extension's tokens are as many as
the control's, not the same; its learning rate, which the paper does not give, is the last of the training before it.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

import rwkv_jax
from experiments import command, stamp, tasks, text
from experiments.compare.run import ARMS, KINDS, swept_lr
from experiments.context import conclusions, copying, reading
from rwkv_jax import corpora, evaluate, optim, run_config

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    arms: tuple = ("rwkv4",)
    seeds: tuple = (0,)
    num_layers: int = 2
    dim: int = 64
    seq_len: int = 256  # T
    batch_size: int = 16
    steps: int = 400
    stages: tuple = ((2, 12), (4, 120), (8, 120))  # (windows in T, steps of as many tokens), as 10 to 100 to 100
    contexts: tuple = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    targets: int = 192
    copy_len: int = 64
    copy_steps: int = 300
    copy_stages: tuple = ((2, 9), (4, 90), (8, 90))
    copy_batch: int = 64
    copy_lr: float | None = None  # None: the best of sweep.json
    lags: tuple = (8, 16, 32, 64, 128, 256, 512, 1024)
    text: str = "stdlib"


PRESETS = {
    "smoke": Preset(
        num_layers=1,
        dim=16,
        seq_len=16,
        batch_size=4,
        steps=4,
        stages=((2, 2),),
        contexts=(16, 32),
        targets=4,
        copy_len=8,
        copy_steps=4,
        copy_stages=((1, 2),),
        copy_batch=4,
        copy_lr=1e-2,
        lags=(4, 8),
    ),
    "cpu": Preset(),
    "gpu": Preset(
        arms=tuple(ARMS),
        seeds=(0, 1),
        num_layers=6,
        dim=512,
        seq_len=512,
        batch_size=32,
        steps=6100,
        stages=((2, 183), (4, 1830), (8, 1830)),
        contexts=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        targets=1024,
        text="enwik8",
    ),
}


def config_of(preset: Preset, arm: str, seed: int):
    """The training run on windows of T."""
    config = run_config.default()
    config.model.update(ARMS[arm], num_layers=preset.num_layers, dim=preset.dim)
    config.update(corpus=preset.text, seed=seed, steps=preset.steps)
    config.update(seq_len=preset.seq_len, batch_size=preset.batch_size, eval_every=0, eval_tokens=0, save_every=0)
    config.optim.lr = swept_lr(arm, preset) or optim.default_lr(KINDS[ARMS[arm]["name"]], preset.dim)
    return config


def gone_on(preset: Preset, seed: int, stages, base: Path, folder: Path):
    """(model, params) after `stages`, which begin where the run in `base` ended."""
    trunk, start = base, preset.steps
    for factor, steps in stages:
        config = config_of(preset, "rwkv4", seed)
        lr = config.optim.lr / 10
        config.optim.update(schedule="constant", lr=lr, lr_end=lr, warmup=0.0, decay=0.0)
        config.update(seq_len=factor * preset.seq_len, batch_size=preset.batch_size // factor, steps=start + steps)
        config.branch_from = f"{trunk}/checkpoints/{start}"
        trunk, start = folder / f"{factor}T", config.steps
        model, params = text.trained(config, trunk)
    return model, params


def measured(model, params, preset: Preset) -> dict:
    """Bits a byte by document: after each context, with the past reset every T bytes, and as the model reads best."""
    T, longest = preset.seq_len, max(preset.contexts)
    test = corpora.prepare(preset.text, "bytes").test
    targets = reading.targets(test, preset.targets, longest, 64 * T)
    recurrent = model.layers == ("rwkv4",)
    contexts = [c for c in preset.contexts if recurrent or c + reading.TARGET <= T]
    told = lambda bits_N: reading.by_document(bits_N, targets)
    reset_N = evaluate.windows(model, params, targets.text.tokens, T, 16)
    best_N = evaluate.best_practice(model, params, targets.text.tokens, targets.text.starts, T, 16)
    return {
        "targets": [n for n in np.bincount(targets.document_N).tolist() if n],
        "after": {str(c): told(reading.bits_after(model, params, targets, c)) for c in contexts},
        "reset": told(reading.bits_of(reset_N, targets)),
        "carried" if recurrent else "sliding": told(reading.bits_of(best_N, targets)),
        "gain_by_distance": reading.gain_by_distance(reset_N, best_N, targets.text, (T, 4 * T, 16 * T, 64 * T)),
    }


def copy_model():
    return rwkv_jax.build("rwkv4", vocab_size=copying.VOCAB_SIZE, num_layers=2, dim=64)


def copy_batch(preset: Preset, stages, seed: int):
    """Batches by step: as many tokens in each, in windows of the stage that the step is in."""
    ends = np.cumsum([steps for _, steps in stages])

    def batch(step: int) -> dict:
        factor = stages[int(np.searchsorted(ends, step, side="right"))][0]
        rng, seq_len = np.random.default_rng([seed, step]), factor * preset.copy_len
        return copying.batch(rng.integers(1, seq_len - 1, preset.copy_batch // factor), seq_len, rng)

    return batch


def copied(model, params, preset: Preset, rows: int = 256) -> dict:
    """Share of symbols given back, by lag."""
    batch = lambda lag: copying.batch(np.full(rows, lag), lag + 2, np.random.default_rng([2**32 - 1, lag]))
    return {str(lag): round(float(tasks.share_right(model, params, batch(lag))), 4) for lag in preset.lags}


def copy(preset: Preset, stages, seed: int, start: Path | None = None, keep: Path | None = None) -> dict:
    """A model trained on the copy task from the initialisers, or from weights in `start`; its share by lag."""
    params = rwkv_jax.load(start)[1] if start else None
    steps = sum(steps for _, steps in stages)
    model, lr = copy_model(), lr_of_copy(preset)
    params, _ = tasks.fit(model, copy_batch(preset, stages, seed), lr=lr, steps=steps, seed=seed, params=params)
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        rwkv_jax.save(keep, model, params)
    return {"share": copied(model, params, preset)}


def cells(preset: Preset, folder: Path) -> command.Cells:
    found = {}
    for seed in preset.seeds:
        of_seed = folder / str(seed)
        extra = sum(steps for _, steps in preset.stages)

        def base(arm, seed=seed, of_seed=of_seed):
            return measured(*text.trained(config_of(preset, arm, seed), of_seed / arm), preset)

        def more(stages, name, seed=seed, of_seed=of_seed):
            return measured(*gone_on(preset, seed, stages, of_seed / "rwkv4", of_seed / name), preset)

        found |= {
            f"rwkv4, seed {seed}": lambda base=base: base("rwkv4"),
            f"extended, seed {seed}": lambda more=more: more(preset.stages, "extended"),
            f"control, seed {seed}": lambda more=more, extra=extra: more(((1, extra),), "control"),
        }
        found |= {f"{arm}, seed {seed}": lambda base=base, arm=arm: base(arm) for arm in preset.arms if arm != "rwkv4"}
    kept = folder / "copy.safetensors"
    more_copies = sum(steps for _, steps in preset.copy_stages)
    return found | {
        "copy": lambda: copy(preset, ((1, preset.copy_steps),), 0, keep=kept),
        "copy, extended": lambda: copy(preset, preset.copy_stages, 1, start=kept),
        "copy, control": lambda: copy(preset, ((1, more_copies),), 1, start=kept),
    }


def lr_of_copy(preset: Preset) -> float:
    if preset.copy_lr:
        return preset.copy_lr
    runs = json.loads((HERE / "sweep.json").read_text())["share"]
    return float(max(runs, key=runs.get))


def sweep(preset: Preset, path: Path) -> None:
    """Share of symbols given back in windows of training length, by learning rate."""
    rates, steps = [2e-3, 4e-3, 8e-3, 1.6e-2], preset.copy_steps // 3  # later many are perfect
    model, batch = copy_model(), copy_batch(preset, ((1, steps),), 2)
    test = copy_batch(replace(preset, copy_batch=512), ((1, steps),), 3)(0)
    stacked, _ = tasks.fit(model, batch, lr=rates, steps=steps)
    right = lambda i: float(tasks.share_right(model, jax.tree.map(lambda x: x[i], stacked), test))
    share = {f"{lr:g}": round(right(i), 4) for i, lr in enumerate(rates)}
    command.write_json(path, {"share": share, "fields": command.fields(preset), "stamp": stamp.stamp()})


if __name__ == "__main__":
    sys.exit(command.main(HERE, __doc__, PRESETS, cells, conclusions.conclude, sweep))
