"""Ablations of RWKV-4: what each part of the model and of its recipe is worth, one changed at a time.

Claim: each part that the paper argues for (token shift, the bonus u of the current token, receptance, a trained decay,
ReLU^2) lowers the loss. The paper prints no ablation of them; of its printed initialiser (appendix E) the claim here
is that it leaves channel mixing without a gradient, so that the released one, its opposite, must be meant.

    python -m experiments.ablations.run               2 x 64, 12 changes, 3 seeds each
    python -m experiments.ablations.run --sweep       learning rate of each arm -> sweep.json
    python -m experiments.ablations.run --preset=gpu  6 x 256, each arm at its own best of three rates
    python -m experiments.ablations.run --smoke --out=DIR
    python -m experiments.ablations.table             the table of results.json

Cost: 38 minutes on 2 shared cores, 39 runs of a minute; `--sweep` as long again; `gpu`: 78 runs, estimated 2 hours
of one H200, in as many sittings as one likes.

What is measured is the difference in bits per byte of held-out text, changed minus released. A pair of runs shares
seed, batches, and the initial values of what both models have. Intervals are the wider of Student's t over seeds and
a bootstrap over documents; p is Student's, corrected for the number of comparisons (Holm): resolved is below 0.05.
  same sign: of the changes that take a part away, one is resolved as worse and none as better; contradicted: one is
  resolved as better; else not resolved. The printed initialiser is contradicted where it is resolved as worse.
Expected of three pairs were intervals of 0.004 to either side; they came out as 0.005 to 0.03. The correction for
twelve comparisons, at two degrees of freedom, asks for about fifteen times its standard error.

Deviations: byte-level models a thousandth of the paper's in size, after half a million tokens. `cpu` holds every arm
at the learning rate that is best for the released model (1.6e-2, inside the grid of experiments/compare/sweep.json,
160 steps as here): what an arm would gain by its own rate counts against it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments import command, sweeps, text
from experiments.statistics import holm, p_value, t_interval, wider
from rwkv_jax import corpora, evaluate, hardware, run_config

HERE = Path(__file__).parent
RELEASED = "RWKV-4"
FROZEN_DECAY = (("/time_decay$", 0.0), ("/time_first$", 3.0))
# Arm: (fields of the model, groups of the optimiser, whether it takes a part away). The important come first.
ARMS = {
    RELEASED: ({}, None, False),
    "no token shift": ({"variant": {"token_shift": False}}, None, True),
    "no receptance": ({"variant": {"receptance": False}}, None, True),
    "no receptance, F + D": ({"variant": {"receptance": False}, "wider": True}, None, True),
    "u = 0": ({"variant": {"current_token": "plain"}}, None, True),
    "no current token": ({"variant": {"current_token": "excluded"}}, None, True),
    "fixed decay": ({}, FROZEN_DECAY, True),
    "exponent n": ({"variant": {"previous_token": "decayed"}}, None, False),
    "GELU": ({"variant": {"activation": "gelu"}}, None, True),
    "ReLU": ({"variant": {"activation": "relu"}}, None, True),
    "initialiser as printed": ({"variant": {"matrix_init": "printed"}}, None, False),
    "all matrices N(0, 0.02)": ({"variant": {"matrix_init": "normal"}, "head_init": "normal"}, None, True),
    "one learning rate": ({}, (), True),
}
PRINTED = "initialiser as printed"


@dataclass(frozen=True)
class Preset:
    arms: tuple = tuple(ARMS)
    seeds: tuple = (0, 1, 2)
    lr: float = 1.6e-2
    rates: tuple = (1.0,)  # multiples of lr; of several, each arm has its best on validation text
    num_layers: int = 2
    dim: int = 64
    dtype: str = "float32"
    seq_len: int = 128
    batch_size: int = 32
    steps: int = 160
    eval_tokens: int = 2**17
    text: str = "stdlib"


TINY = {"num_layers": 1, "dim": 16, "seq_len": 32, "batch_size": 2, "steps": 4, "eval_tokens": 2**11}
PRESETS = {
    "smoke": Preset(arms=(RELEASED, "no token shift", PRINTED), seeds=(0, 1), **TINY),
    "cpu": Preset(),
    "gpu": Preset(
        seeds=(0, 1), lr=4e-3, rates=(0.5, 1.0, 2.0), num_layers=6, dim=256, dtype="bfloat16", seq_len=512, steps=3000,
        text="enwik8",
    ),
}  # fmt: skip


def config_of(preset: Preset, arm: str, seed: int, lr: float):
    """The training run of one arm."""
    fields, groups, _ = ARMS[arm]
    fields = dict(fields)
    if fields.pop("wider", False):  # what the receptances had: 2 D^2
        fields["hidden_dim"] = 5 * preset.dim
    config = run_config.default()
    config.model.update(num_layers=preset.num_layers, dim=preset.dim, dtype=preset.dtype, **fields)
    config.update(corpus=preset.text, steps=preset.steps, seed=seed)
    config.update(seq_len=preset.seq_len, batch_size=preset.batch_size)
    config.update(eval_every=0, eval_tokens=0, save_every=0)
    config.optim.update(lr=lr, groups=groups)
    return config


def trained(preset: Preset, arm: str, seed: int, lr: float, workdir: Path) -> dict:
    """One run, and what it reaches on held-out text in windows of the training length."""
    model, params = text.trained(config_of(preset, arm, seed, lr), workdir)
    corpus = corpora.prepare(preset.text, "bytes")
    shape = (preset.seq_len, preset.batch_size)
    nats, splits = {}, {name: text.capped(getattr(corpus, name), preset.eval_tokens) for name in ("valid", "test")}
    for name, split in splits.items():
        nats[name] = evaluate.windows(model, params, split.tokens, *shape)
    of_documents, num_bytes = evaluate.per_document(nats["test"], splits["test"])
    return {
        "bits_per_byte": round(text.level(nats["test"], splits["test"]), 5),
        "valid_bits_per_byte": round(text.level(nats["valid"], splits["valid"]), 5),
        "document_nats": of_documents.round(2).tolist(),
        "document_bytes": num_bytes.astype(int).tolist(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flops_per_token": hardware.flops_per_token(model, preset.seq_len),
        "corpus_sha256": corpus.sha256,
        "curve": text.curve(workdir, 20),
    }


def name_of(arm: str, seed: int, rate: float) -> str:
    return f"{arm}, seed {seed}" + (f", lr x {rate:g}" if rate != 1 else "")


def cells(preset: Preset, folder: Path) -> command.Cells:
    """A run each: all arms with the first seed before any with the second."""

    def cell(arm, seed, rate):
        workdir = folder / name_of(arm, seed, rate).replace(" ", "_").replace(",", "")
        return lambda: trained(preset, arm, seed, preset.lr * rate, workdir)

    runs = [(arm, seed, rate) for seed in preset.seeds for rate in preset.rates for arm in preset.arms]
    return {name_of(*run): cell(*run) for run in runs}


def over_documents(changed: list[dict], released: list[dict], samples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over documents of the difference in bits per byte, the mean over seeds."""
    nats_SN, released_SN = ([run["document_nats"] for run in runs] for runs in (changed, released))
    nats_N = np.mean(np.subtract(nats_SN, released_SN), axis=0)
    bytes_N = np.array(released[0]["document_bytes"])
    drawn = np.random.default_rng(0).integers(len(nats_N), size=(samples, len(nats_N)))
    differences = nats_N[drawn].sum(1) / np.log(2) / bytes_N[drawn].sum(1)
    return tuple(np.quantile(differences, (0.025, 0.975)).tolist())


def conclude(preset: Preset, values: dict) -> dict:
    """Every arm at its best rate beside the released model at its own; a change's p after Holm's correction."""

    def runs_of(arm):
        """(its best rate, its runs there by seed)."""
        at = lambda rate: [values[name_of(arm, seed, rate)] for seed in preset.seeds]
        best = min(preset.rates, key=lambda rate: np.mean([run["valid_bits_per_byte"] for run in at(rate)]))
        return best, at(best)

    _, released = runs_of(RELEASED)
    rows = {}
    for arm in preset.arms:
        rate, runs = runs_of(arm)
        bits = [run["bits_per_byte"] for run in runs]
        rows[arm] = {key: runs[0][key] for key in ("parameters", "flops_per_token")}
        rows[arm] |= {"lr": preset.lr * rate, "bits_per_byte": round(float(np.mean(bits)), 4)}
        if arm != RELEASED:
            by_seed = np.subtract(bits, [run["bits_per_byte"] for run in released])
            mean, *of_seeds = t_interval(by_seed)
            low, high = wider(of_seeds, over_documents(runs, released))
            rows[arm] |= {"difference": mean, "low": low, "high": high, "by_seed": by_seed.round(5).tolist()}
            rows[arm]["p"] = p_value(by_seed)
    changes = [row for row in rows.values() if "p" in row]
    for row, p in zip(changes, holm([row["p"] for row in changes]), strict=True):
        row["p_holm"] = p
        row["resolved"] = bool(p < 0.05)
    worse = [arm for arm, row in rows.items() if row.get("resolved") and row["difference"] > 0]
    better = [arm for arm, row in rows.items() if row.get("resolved") and row["difference"] < 0]
    parts = [arm for arm in preset.arms if ARMS[arm][2]]
    told = lambda arm: f"{arm} {rows[arm]['difference']:+.3f}"
    resolved = sorted((arm for arm in parts if rows[arm]["resolved"]), key=lambda arm: -rows[arm]["difference"])
    signs = "contradicted" if set(better) & set(parts) else "same sign" if set(worse) & set(parts) else "not resolved"
    return {
        "arms": rows,
        "tokens": preset.steps * preset.seq_len * preset.batch_size,
        "ledger": [
            {
                "artefact": "Parts of the model, one taken away at a time",
                "paper": "each is argued for; no numbers",
                "ours": f"{len(resolved)} of {len(parts)} resolved over {len(preset.seeds)} pairs (Holm over "
                f"{len(changes)}), bits/byte: {', '.join(map(told, resolved)) or 'none'}",
                "verdict": signs,
            },
            {
                "artefact": "Appendix E, initial values as printed",
                "paper": "how the models were initialised",
                "ours": f"channel mixing gets no gradient: {told(PRINTED)} bits/byte beside the released values",
                "verdict": "contradicted" if PRINTED in worse else "not resolved",
            },
        ],
        "not_run": [
            {
                "artefact": "Ablations at 6 x 256, 49 M tokens, each arm at its own learning rate",
                "command": "python -m experiments.ablations.run --preset=gpu",
                "hardware": "one H100 or H200",
                "hours": 2,
                "why": "no GPU for so long",
            }
        ],
    }


def sweep(preset: Preset, path: Path) -> None:
    """Validation bits per byte of each arm and rate."""
    for arm in preset.arms:

        def bits_per_byte(lr, arm=arm):
            workdir = Path("runs/ablations/sweep") / f"{arm}_{lr:g}".replace(" ", "_")
            return trained(preset, arm, preset.seeds[0], lr, workdir)["valid_bits_per_byte"]

        sweeps.bracket(path, arm, preset.lr, bits_per_byte, fields=command.fields(preset))


if __name__ == "__main__":
    sys.exit(command.main(HERE, __doc__, PRESETS, cells, conclude, sweep))
