"""Ablations of RWKV-7: what each part of its time mixing is worth, one changed at a time, and a different start.

Claims: the parts that the paper (arXiv:2503.14456) argues for by the loss lower it: the learned rate a of the delta
rule, the value residual, a decay that depends on the text. The paper argues for the delta rule itself by recall and
state tracking; the bonus and token shift are from earlier versions and get no verdict here. The paper's main text has
no number for any part, and its appendix of ablations was not at hand. The second claim is by users of
flash-linear-attention (fla, issue 218): from the start values that fla had until April 2025 the loss falls more slowly
than from the released ones. They show a picture, no number.

    python -m experiments.ablations_rwkv7.run         2 x 64, 9 changes, 3 seeds each
    python -m experiments.ablations_rwkv7.run --smoke

Cost: 30 runs on one core of a Xeon, most of them of 45 to 91 seconds; one was timed at 20 minutes. 54 minutes in all.

Measured: bits per byte of held-out text, changed minus released, in pairs (`study.compared`). *Resolved* means p below
0.05 after Holm's correction for 9 comparisons, which at three pairs requires effects of a dozen standard errors.
  same sign      parts that the paper argues for by the loss (rate a, value residual, decay): one removed part is
                 resolved as worse and none as better; start: it is resolved as worse
  contradicted   parts: one is resolved as better; start: it is resolved as better
  not resolved   otherwise
  not comparable the delta rule by itself, which the paper argues for by recall and state tracking, not by the loss on
                 text of 128 bytes
  no claim       removal 2, which the released model does not have; RWKV-4's embedding, uniform in +-6e-4 where
                 RWKV-7's is in +-1e-4, added later: is it why RWKV-7 starts more slowly in experiments/perplexity?

Deviations: byte-level models of one head, a thousandth of the paper's in size, after 614,400 tokens, where RWKV-7 is
still behind RWKV-4: parts that pay off late look worthless. Every arm has the best rate of the released model (4e-3,
from experiments/compare/sweep.json), so an arm is not credited with what its own best rate would gain. The arm without
a text-dependent decay keeps the decay's map, which stays zero. fla's start has the released widths of the low-rank
maps, and shares no initial value with its pair except zeros and ones.
"""

import re
from pathlib import Path

import flax.linen as nn
import jax

import rwkv_jax
from experiments import statistics, study
from experiments.command import claim
from rwkv_jax import models
from rwkv_jax.train import run_config

RELEASED, DELTA, SWAPS, START = "RWKV-7", "no delta rule", "removal 2", "start values of fla"
EMBEDDING = "embedding of RWKV-4"
PARTS = {
    DELTA: {"model.variant.removal": 0.0},
    "in-context rate 1": {"model.variant.in_context_rate": False},
    "no value residual": {"model.variant.value_residual": False},
    "no bonus": {"model.variant.bonus": False},
    "no token shift": {"model.variant.token_shift": False},
    "decay without text": {"optim.groups": ((r"/att/w[12]$", 0.0), (r"/w0$", 2.0))},
}
# by the loss on text; the delta rule is for recall and state tracking, bonus and token shift are from earlier papers
ARGUED_FOR = ("in-context rate 1", "no value residual", "decay without text")
OTHERS = {
    SWAPS: {"model.variant.removal": 2.0},
    START: {"finetune.model": START},
    EMBEDDING: {"model.embedding_init": "v4neo"},
}
UNCLAIMED = {SWAPS: "RWKV-7 with twice the removal", EMBEDDING: "RWKV-7 from RWKV-4's embedding"}
# Published statements on each arm.
SAID = {
    DELTA: "argued for by recall and state tracking",
    "in-context rate 1": "argued for: how much is replaced may differ by channel and token",
    "no value residual": "argued for; no number in the main text",
    "no bonus": "kept from earlier versions",
    "no token shift": "kept from earlier versions; +0.146 bits a byte in RWKV-4 (experiments/ablations)",
    "decay without text": "argued for; in RWKV-6 mixes that depend on the text are worth 0.016 nats, 0.003 of them "
    "those of the decay (arXiv:2404.05892, appendix K)",
    SWAPS: "eigenvalues to -1 are for state tracking; no number for text",
    START: "worse from the first steps on (fla, issue 218)",
    EMBEDDING: "not in the papers",
}
# fla at 10f8c073 (2025-03-07), fla/layers/rwkv7.py and fla/models/rwkv7/modeling_rwkv7.py, by path: the first
# match counts. Vectors, including k_k, start at zero: nothing is removed then, and k_k never gets a gradient. Pull
# requests 365 to 493 of April to June 2025 brought the released values.
VALUES_OF_FLA = (
    (r"/scale$", nn.initializers.ones),
    (r"^(emb|head)/|/ffn/\w+/kernel$", nn.initializers.normal(0.02)),
    (r"/kernel$|/[wavg][12]$", nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform")),  # Xavier, gain 2^-2.5
    (r"", nn.initializers.zeros),
)


def start_of_fla(model, seed: int):
    """Return parameters with fla's start values, for a model with one set per layer."""

    def drawn(path, like):
        name = "/".join(key.key for key in path)
        values = next(values for pattern, values in VALUES_OF_FLA if re.search(pattern, name))
        return values(jax.random.fold_in(jax.random.key(seed), names.index(name)), like.shape, like.dtype)

    shapes = models.parameter_shapes(model)
    names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return jax.jit(lambda: jax.tree_util.tree_map_with_path(drawn, shapes))()


def prepare(config, folder: Path) -> None:
    """Replace `START` in a config by the path of a weights file."""
    if config.finetune.model == START:
        model = run_config.model_of(config).clone(scan=False)
        path = folder / f"fla-{model.num_layers}x{model.dim}-seed{config.seed}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        rwkv_jax.save(path, model, start_of_fla(model, config.seed))
        config.finetune.model = str(path)


def conclude(its, values: dict) -> dict:
    """Return the rows of the ledger (parts, delta rule, removal 2, start), and every arm beside SAID."""
    rows = study.compared(its, values)
    of = lambda arm: statistics.told_row(rows[arm])
    resolved = lambda arm, sign: rows[arm]["resolved"] and sign * rows[arm]["difference"] > 0
    taken = [arm for arm in ARGUED_FOR if arm in rows]  # a smoke run lacks some
    worse, better = ([arm for arm in taken if resolved(arm, sign)] for sign in (1, -1))
    largest = max(taken, key=lambda arm: rows[arm]["difference"])
    parts = "contradicted" if better else "same sign" if worse else "not resolved"
    size, pairs = study.size_of(its), len(study.seeds_of(its))
    start = "same sign" if resolved(START, 1) else "contradicted" if resolved(START, -1) else "not resolved"
    return {
        "ledger": [
            claim(
                "RWKV-7, parts taken away one at a time",
                "each is argued for; no numbers in the main text",
                f"{largest} {of(largest)} bits a byte",
                parts,
                run=f"{size}, {pairs} pairs",
                details=f"{len(worse)} of {len(taken)} resolved as worse, {len(better)} as better",
            ),
            claim("RWKV-7 without the delta rule", SAID[DELTA], f"{of(DELTA)} bits a byte", "not comparable"),
            *(
                claim(changed, SAID[arm], f"{of(arm)} bits a byte", "no claim")
                for arm, changed in UNCLAIMED.items()
                if arm in rows
            ),
            claim("RWKV-7 from fla's start values of March 2025", SAID[START], f"{of(START)} bits a byte", start),
        ],
        "beside": {arm: {"said": said, "here": of(arm)} for arm, said in SAID.items() if arm in rows},
    }


STUDY = {
    "base": {
        "model": {"name": "rwkv7", "num_layers": 2, "dim": 64}, "seq_len": 128, "batch_size": 16, "steps": 300,
        "optim.lr": 4e-3,
    },
    "arms": {RELEASED: {}} | PARTS | OTHERS,
    "seeds": 3,
    "measure": "bits_per_byte",
    "against": RELEASED,
    "prepare": prepare,
    "conclude": conclude,
    "presets": {"smoke": {"arms": (RELEASED, DELTA, ARGUED_FOR[0], SWAPS, START)}},
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
