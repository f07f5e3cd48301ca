"""Training in bfloat16 against float32, everything else equal: activations, or parameters, in bfloat16.

Claims: the released models were trained in bfloat16. With parameters, moments, WKV, norms' statistics and logits in
float32, bfloat16 activations cost less than 0.01 bits a byte of held-out text. Parameters kept in bfloat16 lose what
rounding after every step removes (a change below 1/512 of a parameter vanishes), and save 2 bytes of memory per
parameter. Two runs with the same seed are equal, bit for bit on a CPU.

    python -m experiments.bf16.run                        2 x 64 on the embedded corpus, 3 seeds of each
    python -m experiments.bf16.run --preset=gpu           6 x 512
    python -m experiments.bf16.run --smoke

Held-out text is scored in float32 for all arms, so differences come from training alone.

Cost: 6 minutes on 2 CPU cores; `gpu`, estimated: 10 minutes on one H100.

Paper: trained in bfloat16 (released code), without a float32 run beside it.
  reproduced     the interval of the paired difference lies below +0.01 bits a byte
  contradicted   it lies above
  not resolved   otherwise

Deviations: one small model, one rate, few steps. These cannot show a loss of accuracy in long runs or large models.
"""

import hashlib
from functools import partial

import jax
import numpy as np

from experiments import measures, statistics, study
from experiments.command import claim, not_run
from experiments.runs import curve, trained
from rwkv_jax import evaluate

BASE = "float32"
ARMS = {
    BASE: {},
    "bfloat16 activations": {"model.dtype": "bfloat16"},
    "bfloat16 parameters": {"model.param_dtype": "bfloat16"},
}
REPEATED = (BASE, "bfloat16 activations")  # arms whose first seed runs twice
TOLERATED = 0.01  # bits a byte


def in_float32(model, params, corpus) -> dict:
    """Bits per byte in windows, computed in float32."""
    shape = (corpus.seq_len, corpus.batch_size)
    nats_N = evaluate.windows(model.clone(dtype=BASE), params, corpus.test.tokens, *shape)
    return measures.by_document("in_float32", nats_N, corpus.test)


def digest(model, params, corpus) -> dict:
    """Return the SHA-256 of the parameters."""
    return {"digest": hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))).hexdigest()}


def again(changes, config, folder) -> dict:
    """Repeat a run with the same seed."""
    config.update_from_flattened_dict(changes)
    _, params, workdirs = trained([config], folder / "again")
    return digest(None, params, None) | {"curve": curve(workdirs)}


def verdict(low, high) -> str:
    if low is None or low <= TOLERATED <= high:
        return "not resolved"
    return "reproduced" if high < TOLERATED else "contradicted"


def conclude(its, values) -> dict:
    """Return the rows of the ledger: the cost of each arm, and whether runs of one seed are equal."""
    config, compared = study.config_of(its), study.compared(its, values)
    size = f"{study.size_of(its)}, {config.steps} steps, "
    size += f"{len(study.seeds_of(its))} paired seeds"
    rows = []
    for arm in list(compared)[1:]:
        difference, low, high = (compared[arm][name] for name in ("difference", "low", "high"))
        ours = f"{statistics.told(difference, low, high, 4)} bits a byte against float32"
        paper = "trained in bfloat16, no float32 beside it"
        details = f"float32 {compared[BASE]['in_float32']:.3f}; above {TOLERATED} contradicts"
        rows.append(claim(f"Training with {arm}", paper, ours, verdict(low, high), run=size, details=details))
    first = lambda arm, suffix: (values[f"{arm}, seed 0{suffix}"][name] for name in ("digest", "curve"))
    same = {arm: list(first(arm, "")) == list(first(arm, ", again")) for arm in REPEATED}
    ours = ", ".join(f"{arm}: {'the same bits' if equal else 'other bits'}" for arm, equal in same.items())
    rows.append(claim("The same seed twice", "not in the paper", ours, "no claim"))
    larger = not_run("Training in bfloat16 at 6 x 512", "python -m experiments.bf16.run --preset=gpu", hours=0.2)
    return {"ledger": rows, "not_run": [larger] if config.model.dim < 512 else []}


LARGE = {"model": {"num_layers": 6, "dim": 512}, "seq_len": 512, "batch_size": 32, "steps": 2000}
STUDY = {
    "base": {"model": {"num_layers": 2, "dim": 64}, "seq_len": 128, "batch_size": 16, "steps": 200},
    "arms": ARMS,
    "seeds": 3,
    "measure": (in_float32, digest),
    "against": BASE,
    "held_out": 2**16,
    "also": lambda: {f"{arm}, seed 0, again": partial(again, ARMS[arm]) for arm in REPEATED},
    "conclude": conclude,
    "presets": {"smoke": {"seeds": 1}, "gpu": {"base": LARGE, "held_out": 2**20}},
}

if __name__ == "__main__":
    study.main(**STUDY)
