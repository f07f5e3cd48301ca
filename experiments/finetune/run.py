"""A small model of source code adapted to prose, by every way to fine-tune.

Claim: after the same few batches of the new text, full fine-tuning comes closest to it and forgets most of the old;
LoRA comes near with a fraction of the numbers, and a tuned initial state, 4 numbers a channel and layer, gains a
little and forgets nothing that leaving it out does not bring back. Contradicted where an interval of the table says
otherwise. It is a demonstration: one seed, a base of minutes, and the better of two learning rates.

    python -m experiments.finetune.run                (--text=PATH: other text; --base=PATH: another base, of bytes)
    python -m experiments.finetune.run --smoke --out=DIR

The base learns the embedded corpus, the source of Python's library; the new text is Python's own reference manual,
as `help()` shows it: `pydoc_data.topics`, cut at blank lines into pieces of a few kilobytes. Every run is the command
of training with `configs/finetune.py`. Learning rates are chosen on the validation split of the new text; the table
is of held-out pieces and files that nothing was chosen on.

Cost: 14 minutes on 2 cores that others used too. Writes results.json and figure.png beside this file.
"""

import argparse
import json
import platform
import pydoc_data.topics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

import rwkv_jax
from experiments import stamp
from experiments.finetune import plot, table
from experiments.text import capped
from rwkv_jax import corpora, evaluate, finetune, optim, run_config, train

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "finetune.py"
PIECE_BYTES = 4096
# arm: method, changes of the config, learning rates tried
ARMS = {
    "full": ("full", {}, (6e-4, 2e-3)),
    "full, embedding frozen": ("full", {"optim.groups": ((r"^emb/", 0.0), *optim.released_groups())}, (6e-4, 2e-3)),
    "LoRA, rank 2": ("lora", {"finetune.rank": 2, "finetune.alpha": 4.0}, (5e-3, 2e-2)),
    "LoRA, rank 8": ("lora", {"finetune.rank": 8, "finetune.alpha": 16.0}, (5e-3, 2e-2)),
    "state": ("state", {}, (3e-2, 1e-1)),
}


@dataclass(frozen=True)
class Preset:
    num_layers: int = 4
    dim: int = 128
    base_steps: int = 250
    steps: int = 40
    seq_len: int = 256
    batch_size: int = 8
    held_out_bytes: int = 2**16
    rates: int = 2


SMOKE = Preset(num_layers=2, dim=16, base_steps=2, steps=2, seq_len=32, batch_size=2, held_out_bytes=2**11, rates=1)


def topics() -> Path:
    """A folder of Python's reference manual, in pieces."""
    folder = corpora.cache_dir() / f"pydoc-topics-{platform.python_version()}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent))
        for topic, text in sorted(pydoc_data.topics.topics.items()):
            for i, piece in enumerate(_pieces(text)):
                (beside / f"{topic}-{i:02}.txt").write_text(piece)
        beside.replace(folder)
    return folder


def _pieces(text):
    """Consecutive parts of a text, each of whole paragraphs and at least PIECE_BYTES, but for the last."""
    piece = ""
    for paragraph in text.strip().split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= PIECE_BYTES:
            yield piece
            piece = ""
    if piece:
        yield piece


def base_config(preset, seed):
    config = run_config.default()
    config.model.update(num_layers=preset.num_layers, dim=preset.dim)
    return _shaped(config, preset, preset.base_steps, seed)


def arm_config(arm, lr, base, text, preset, seed):
    method, changes, _ = ARMS[arm]
    config = run_config.read(f"{CONFIG}:{method}")
    config.update_from_flattened_dict(changes)
    config.corpus, config.finetune.model, config.optim.lr = str(text), str(base), lr
    return _shaped(config, preset, preset.steps, seed)


def _shaped(config, preset, steps, seed):
    config.update(steps=steps, seed=seed, seq_len=preset.seq_len, batch_size=preset.batch_size)
    config.update(log_every=max(1, steps // 10), eval_every=0, eval_tokens=0, save_every=0)
    return config


def run_arm(arm, base, text, preset, seed, folder, validation):
    """(nats of a split as a function of it, what is to be told) of the run with the best learning rate."""
    tried = {}
    for lr in ARMS[arm][2][: preset.rates]:
        config, workdir = arm_config(arm, lr, base, text, preset, seed), folder / f"{arm} {lr:g}"
        state = train.run(config, workdir)
        if int(state.step) < preset.steps:
            raise KeyboardInterrupt
        model, params = rwkv_jax.load(workdir)
        tuned = finetune.tuned_state(model, state.params, preset.batch_size) if ARMS[arm][0] == "state" else None
        nats = partial(_nats, model, params, preset, tuned)
        tried[lr] = level(nats(validation), validation), nats
    factors = optim.factors(state.params, config.optim.groups or ())
    trained = sum(x.size for x, f in zip(*map(jax.tree.leaves, (state.params, factors)), strict=True) if np.any(f))
    best = min(tried, key=lambda lr: tried[lr][0])
    validated = {f"{lr:g}": bits for lr, (bits, _) in tried.items()}
    return tried[best][1], {"trained": trained, "lr": best, "validation_bits_per_byte": validated}


def _nats(model, params, preset, tuned, split):
    return evaluate.windows(model, params, split.tokens, preset.seq_len, preset.batch_size, tuned)


def level(nats_N, split):
    return evaluate.bits_per_byte(*evaluate.per_document(nats_N, split))


def difference(a_N, b_N, split, seed):
    found = evaluate.paired_difference(a_N, b_N, split, seed)
    return [None if np.isnan(x) else x for x in found]  # one document has no interval


def compare(preset, seed, text, base, folder):
    """Everything that the table and the figure need, as one JSON object."""
    began = time.perf_counter()
    say = lambda what: print(f"[{time.perf_counter() - began:3.0f} s] {what}", file=sys.stderr, flush=True)
    old, new = corpora.prepare("stdlib"), corpora.prepare(str(text))
    if base is None:
        say(f"the base: {preset.base_steps} steps on {old.name}")
        base = folder / "base"
        if int(train.run(base_config(preset, seed), base).step) < preset.base_steps:
            raise KeyboardInterrupt
    model, params = rwkv_jax.load(base)
    splits = {"old": capped(old.test, preset.held_out_bytes), "new": capped(new.test, preset.held_out_bytes)}
    validation = capped(new.valid, preset.held_out_bytes)
    plain = {name: _nats(model, params, preset, None, split) for name, split in splits.items()}
    nats, arms = {"none": plain}, {"none": {"trained": 0}}
    for arm in ARMS:
        say(f"{arm}: {preset.steps} steps at each of {len(ARMS[arm][2][: preset.rates])} learning rates")
        scored, arms[arm] = run_arm(arm, base, text, preset, seed, folder, validation)
        nats[arm] = {name: scored(split) for name, split in splits.items()}
    for arm, row in arms.items():
        for name, split in splits.items():
            row[name] = {"bits_per_byte": level(nats[arm][name], split)}
            for other in ("none", "full"):
                row[name][f"minus_{other}"] = difference(nats[arm][name], nats[other][name], split, seed)
    texts = {
        name: {
            "name": c.name,
            "sha256": c.sha256,
            "held_out": splits[name].num_bytes,
            "documents": len(splits[name].starts),
        }
        for name, c in (("old", old), ("new", new))
    }
    tokens = {"train_tokens_of_new": len(new.train.tokens), "parameters": sum(x.size for x in jax.tree.leaves(params))}
    results = {"arms": arms, "texts": texts, "preset": {**vars(preset), "seed": seed}, **tokens}
    return results | {"wall_seconds": time.perf_counter() - began, "stamp": stamp.stamp()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.finetune.run", description="A model of code adapted to prose, in every way."
    )
    parser.add_argument("--text", type=Path, help="a text file or folder instead of Python's manual")
    parser.add_argument("--base", type=Path, help="whatever rwkv_jax.load reads, of bytes, instead of training one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and figure.png")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, numbers without meaning")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            preset = SMOKE if args.smoke else Preset()
            results = compare(preset, args.seed, args.text or topics(), args.base, Path(folder))
        target = args.out / "results.json"
        beside = target.with_suffix(".partial")
        beside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        beside.replace(target)
        plot.draw(results, args.out / "figure.png")
        print(table.render(results))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"written: {target}, {args.out / 'figure.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
