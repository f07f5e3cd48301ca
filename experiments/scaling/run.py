"""Loss of RWKV-4, RWKV-7 and transformers against training compute (Fig. 4): is it a straight line, or does it bend?
How much compute does each model need for the same loss?

Claim: over 45 models, a straight line through the Pareto frontier of loss against compute in log-log has r^2 0.994,
and 0.875 one order of magnitude beyond. A saturating law without noise has an r^2 of 0.998 too. Reported here is
therefore the line's error on the last decade of compute, which it was not fitted to, beside the error of E + k C^-a.
Every point is a run with its own decay: a branch of one trunk per size, on the batches of experiments/perplexity,
which shares its runs of 4 x 128.

    python -m experiments.scaling.run                      2 x 64 to 4 x 192, 1 to 34 M tokens: 24 models an arm
    python -m experiments.scaling.run --kept               the same from the finished runs
    python -m experiments.scaling.run --preset=gpu --text=enwik8     36 models an arm, 1.5e13 to 2.4e16 FLOP
    python -m experiments.scaling.run --preset=paper --text=PILE     45 models an arm, to 2.3e19 FLOP
    python -m experiments.scaling.run --sweep          learning rates that sweep.json lacks; also for a preset

`missing` in results.json lists the runs that are still to be done.
Cost, estimated: cpu 19 hours on 2 cores beside those of experiments/perplexity; gpu 22 minutes an arm of one
H200, paper a month of one.
Rules, for RWKV-4 with at least 5 runs on the frontier before the last decade and 3 in it, else "not comparable":
  reproduced     the interval of E contains 0, and the line is off by no more than 5 % anywhere in the last decade
  contradicted   the interval of E is above 0, and in the last decade the line predicts worse than the saturating law,
                 with an interval above 0 too
  not resolved   otherwise
  no claim       compute at equal loss, for which the paper has no number, and the line through points of a bending
                 law, for which nothing is trained
Intervals of the laws are a bootstrap over runs. Exponents in nats per byte are not the paper's, which are per token
of GPT-NeoX. Compute at equal loss is the ratio of the compute that two frontiers need for the lowest loss that both
reach: a mean over losses depends on which budgets ran, and most of these losses are behind a 6-gram. Its interval is
over documents, or over seeds where that is wider, with the spread of experiments/perplexity; that is of one budget,
where a seed's effect on both arms cancels, and here budgets may differ. `gpu` and `paper`, without nats by document,
have none.
Deviations: bytes instead of tokens, and novels instead of the Pile; compute is 6 FLOPs a weight and token plus those
of attention and of WKV (RWKV-7's in chunks of 16 tokens), without the embedding's look-up; one seed a run; learning
rates by width from sweeps of short runs on source code, of `sweep.json` here and in experiments/compare, although
longer runs may need lower ones. RWKV-7's at 3 x 96 and both RWKVs' at 4 x 192 are from 256 steps on the study's own
corpus. Those of the transformers at 4 x 192 are interpolated from the widths beside until `--sweep` has searched them,
on that corpus too. None of the nine runs of 4 x 192 is on a frontier yet: below 2e14 FLOP that width is too large to
pay. Runs of 2 x 64 up to 8.4 M tokens, and short runs of the other sizes, are behind a 6-gram of the same bytes.
"""

import itertools
import math
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from experiments import statistics, study, sweeps
from experiments.command import claim, not_run
from experiments.engineering import read
from experiments.perplexity.run import MAIN
from experiments.perplexity.run import STUDY as PERPLEXITY
from experiments.scaling import fit

SWEEP = Path(__file__).with_name("sweep.json")
SYNTHETIC = np.geomspace(1e17, 1e20, 46)  # FLOP, the range of Fig. 4
LARGE_ARMS = ("rwkv4", "transformer", "transformer+shift")
PAIRS = (
    ("rwkv7", "rwkv4"),
    ("rwkv4", "transformer"),
    ("rwkv7", "transformer+shift"),
    ("transformer+shift", "transformer"),
)


def arm_of(name: str, num_layers: int, dim: int, base) -> dict:
    """Return a model of one size at the best learning rate of its sweep, interpolated between swept widths."""
    size = {"num_layers": num_layers, "dim": dim, "head_size": math.gcd(64, dim)}
    lr = sweeps.lr(SWEEP, name, num_layers, dim)
    return study.flat(study.MODELS[name]) | study.flat({"model": size, "optim.lr": lr})


def arms_of(sizes, names) -> dict:
    """Return the models at all sizes, small sizes first, because the laws need all of them."""
    return {f"{name} {L}x{D}": partial(arm_of, name, L, D) for L, D in sizes for name in names}


def conclude(its, values: dict) -> dict:
    """Return the laws through each model's frontier, a straight line fitted to a bending law, and compute ratios."""
    named = {}  # runs by model
    for arm, budget in itertools.product(study.arms_of(its), its.budgets):
        for run in study.runs_of(its, values, arm, budget)[:1]:
            named.setdefault(arm.split()[0], []).append(run)
    arms = {name: of_arm(runs) for name, runs in named.items()}
    ratios = {f"{a} over {b}": ratio_of(named[a], named[b]) for a, b in PAIRS if {a, b} <= named.keys()}
    ratios = {pair: its for pair, its in ratios.items() if its}
    synthetic = fit.judged(SYNTHETIC, fit.chinchilla(SYNTHETIC), SYNTHETIC[-1] / 10 * (1 + 1e-9))
    return {
        "arms": arms,
        "compute_at_equal_loss": ratios,
        "synthetic": synthetic,
        "ledger": [
            _row(arms),
            _synthetic_row(synthetic["line"]),
            *itertools.starmap(_ratio_row, ratios.items()),
        ],
        "not_run": [] if study.config_of(its).model.dtype == "bfloat16" else _not_run(),
    }


def compute_of(run: dict) -> float:
    return run["flops_per_token"] * run["tokens"]


def nats_of(run: dict) -> float:
    """Return the held-out loss per token, or per byte if tokens are bytes."""
    return run["nats_per_token"] if "nats_per_token" in run else run["bits_per_byte"] * math.log(2)


def ratio_of(these: list[dict], those: list[dict]) -> dict | None:
    """Return `fit.ratio` of the runs of two models; without nats by document, all text counts as one."""
    if "bits_per_byte_nats" in these[0]:
        nats_of_documents, bytes_D = (lambda run: run["bits_per_byte_nats"]), these[0]["bits_per_byte_bytes"]
        spread = seed_spread()
    else:
        nats_of_documents, bytes_D, spread = (lambda run: [nats_of(run)]), [1], None
    found = (([compute_of(run) for run in runs], [nats_of_documents(run) for run in runs]) for runs in (these, those))
    return fit.ratio(*found, bytes_D, spread)


def seed_spread() -> statistics.Spread | None:
    """Return the spread of two arms' difference over seeds, in nats a byte, from experiments/perplexity's results."""
    its = read("perplexity/results.json")["spread"]
    return its and statistics.Spread(its["deviation"] * math.log(2), its["freedom"])


def of_arm(runs: list[dict]) -> dict:
    """Return the points of a model, the laws through its frontier and their intervals."""
    compute, loss = list(map(compute_of, runs)), list(map(nats_of, runs))
    until = max(compute) / 10
    return {
        "flops": compute,
        "loss_nats": loss,
        "frontier": fit.pareto(compute, loss).tolist(),
        "fitted_until": until,
        "laws": fit.judged(compute, loss, until),
        "intervals": fit.bootstrap(compute, loss, until),
    }


def verdict(its) -> str:
    """Return the verdict on RWKV-4 by the rules of the header."""
    laws, intervals = its["laws"], its["intervals"]
    if laws is None or laws["points"][0] < 5 or laws["points"][1] < 3 or not intervals["samples"]:
        return "not comparable"
    floor, worse = intervals["floor"][0], intervals["line minus saturating, rms beyond"][0]
    if floor > 1e-3 and worse > 0:
        return "contradicted"
    return "reproduced" if floor <= 1e-3 and laws["line"]["beyond"]["max"] <= 0.05 else "not resolved"


def _row(arms) -> dict:
    its = arms["rwkv4"]
    run = f"{len(its['flops'])} models, {min(its['flops']):.1e} to {max(its['flops']):.1e} FLOP"
    error = f"off by {100 * its['laws']['line']['beyond']['max']:.1f} % at most" if its["laws"] else "too few models"
    artefact = "Fig. 4: a line through loss against compute, in the decade beyond it"
    return claim(artefact, "45 models, r2 0.994, then 0.875", error, verdict(its), run=run)


def _ratio_row(pair: str, its: dict) -> dict:
    run = f"at {its['loss_nats']:.3f} nats a token, 1 seed"
    return claim(f"Compute at equal loss, {pair}", "no number", fit.told(its), "no claim", run=run)


def _synthetic_row(line) -> dict:
    return claim(
        "Fig. 4: that r2 0.994 shows a straight line",
        "r2 0.994",
        f"r2 {line['fit']['r2_explained']:.3f} of a line through Chinchilla's law, which bends",
        "no claim",
    )


def _not_run() -> list[dict]:
    run, hardware = "python -m experiments.scaling.run --preset=", "one H200"
    gpu, paper = "Fig. 4 over 3 decades, 36 models an arm", "Fig. 4 at its own sizes, to 2.3e19 FLOP"
    return [
        not_run(gpu, f"{run}gpu --text=enwik8", 1.1, hardware, "no GPU with enwik8 at hand"),
        not_run(paper, f"{run}paper --text=PILE", 700, hardware, "no GPU, and no Pile"),
    ]


SIZES = ((2, 64), (3, 96), (4, 128), (4, 192))
LARGE = {
    "base": {
        "model.dtype": "bfloat16", "seq_len": 512, "batch_size": 32, "corpus": "enwik8", "optim.warmup": 0.005,
    },
    "arms": arms_of(((4, 128), (6, 192), (6, 256), (8, 320), (8, 448), (12, 512)), LARGE_ARMS),
    "measure": "nats_per_token",
    "budgets": (171, 343, 686, 1372, 2745, 5490),
    "held_out": 2**20,
    "sweep": study.Sweep(
        name=lambda arm: arm.split()[0], value=itemgetter("valid_nats_per_token"), known=sweeps.COMPARE
    ),
}  # fmt: skip
PILE = {"corpus": "pile", "tokenizer": "20B_tokenizer.json", "model.vocab_size": 50277, "seq_len": 1024}
PAPER_SIZES = (
    (6, 256), (6, 384), (8, 512), (12, 512), (12, 640), (12, 768), (16, 896), (20, 960), (24, 1024)
)  # fmt: skip
STUDY = {
    # sizes in common share their runs with perplexity
    **{name: PERPLEXITY[name] for name in ("base", "measure", "budgets", "held_out")},
    "arms": arms_of(SIZES, MAIN),
    "against": None,
    "sweep": study.Sweep(name=lambda arm: arm.split()[0], known=sweeps.COMPARE),
    "conclude": conclude,
    "presets": {
        "smoke": {
            "base": {"corpus": "stdlib", "optim.warmup": 0.05},
            "arms": arms_of(((1, 8),), MAIN[:2]),
            "budgets": (8, 9, 10, 12, 120),
        },
        "gpu": LARGE,
        "paper": LARGE
        | {
            "base": LARGE["base"] | PILE | {"batch_size": 256},
            "arms": arms_of(PAPER_SIZES, LARGE_ARMS),
            "budgets": (2384, 4768, 9537, 19073, 38147),
        },
    },
}

if __name__ == "__main__":
    study.main(**STUDY)
