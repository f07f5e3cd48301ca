"""Ablations of RWKV-4: what each part of the model and of its training recipe is worth, one changed at a time.

Claim: each part that the paper argues for (token shift, the bonus u of the current token, receptance, a trained decay,
ReLU^2) lowers the loss. The paper prints no ablation of them. For the paper's printed initialiser (appendix E), the
claim here is that it leaves channel mixing without a gradient, so that the released initialiser, its opposite, must be
meant.

    python -m experiments.ablations.run               2 x 64, 12 changes, 3 seeds each
    python -m experiments.ablations.run --preset=gpu  6 x 256, each arm at its own best learning rate
    python -m experiments.ablations.run --smoke

Cost: 38 minutes on 2 shared cores, 39 runs of a minute; `gpu`: 52 runs or more, estimated 2 hours of one H200.

Measured: bits per byte of held-out text, changed minus released, in pairs (`study.compared`). *Resolved* means p below
0.05 after Holm's correction, which at three pairs and twelve comparisons requires fifteen standard errors.
  same sign      among the changes that remove a part, one is resolved as worse and none as better
  contradicted   one is resolved as better; for the printed initialiser: it is resolved as worse
  not resolved   otherwise

Deviations: byte-level models a thousandth of the paper's in size, after 655,360 tokens. `cpu` trains every arm
at the best learning rate of the released model (1.6e-2, from experiments/compare/sweep.json), so an arm is not
credited with what its own best rate would gain.
"""

from experiments import statistics, study
from experiments.command import claim, not_run

RELEASED, PRINTED = "RWKV-4", "initialiser as printed"
FROZEN_DECAY = (("/time_decay$", 0.0), ("/time_first$", 3.0))
# Changes that remove a part, the most important first.
PARTS = {
    "no token shift": {"model.variant.token_shift": False},
    "no receptance": {"model.variant.receptance": False},
    # F + D: as many parameters as the receptances had, 2 D^2
    "no receptance, F + D": lambda base: {"model.variant.receptance": False, "model.hidden_dim": 5 * base.model.dim},
    "u = 0": {"model.variant.current_token": "plain"},
    "no current token": {"model.variant.current_token": "excluded"},
    "fixed decay": {"optim.groups": FROZEN_DECAY},
    "GELU": {"model.variant.activation": "gelu"},
    "ReLU": {"model.variant.activation": "relu"},
    "all matrices N(0, 0.02)": {"model.variant.matrix_init": "normal", "model.head_init": "normal"},
    "one learning rate": {"optim.groups": ()},
}
OTHERS = {"exponent n": {"model.variant.previous_token": "decayed"}, PRINTED: {"model.variant.matrix_init": "printed"}}


def conclude(its, values: dict) -> dict:
    """Return the rows of the ledger: the parts, and the printed initialiser."""
    rows = study.compared(its, values)
    told = lambda arm: f"{arm} {statistics.told_row(rows[arm])}"
    worse = [arm for arm, row in rows.items() if row.get("resolved") and row["difference"] > 0]
    better = [arm for arm, row in rows.items() if row.get("resolved") and row["difference"] < 0]
    parts = [arm for arm in rows if arm in PARTS]
    resolved = sorted({*worse, *better} & set(parts), key=lambda arm: -rows[arm]["difference"])
    signs = "contradicted" if set(better) & set(parts) else "same sign" if set(worse) & set(parts) else "not resolved"
    pairs = len(study.seeds_of(its))
    size = study.size_of(its)
    return {
        "ledger": [
            claim(
                "Parts of the model, one taken away at a time",
                "each is argued for; no numbers",
                f"{len(resolved)} of {len(parts)} resolved: {told(resolved[0]) if resolved else 'none'} bits a byte",
                signs,
                run=f"{size}, {pairs} pairs",
                details=f"Holm over {len(rows) - 1}: {', '.join(map(told, resolved))}",
            ),
            claim(
                "Appendix E, initial values as printed",
                "how the models were initialised",
                f"{told(PRINTED)} bits a byte beside the released values",
                "contradicted" if PRINTED in worse else "not resolved",
                run=f"{size}, {pairs} pairs",
                details="channel mixing gets no gradient",
            ),
        ],
        "not_run": [
            not_run(
                "Ablations at 6 x 256, 49 M tokens, each arm at its own learning rate",
                "python -m experiments.ablations.run --preset=gpu",
                hours=2,
            )
        ],
    }


LARGE = {"num_layers": 6, "dim": 256, "dtype": "bfloat16"}
STUDY = {
    "base": {
        "model": {"num_layers": 2, "dim": 64}, "seq_len": 128, "batch_size": 32, "steps": 160, "optim.lr": 1.6e-2,
    },
    "arms": {RELEASED: {}} | PARTS | OTHERS,
    "seeds": 3,
    "measure": "bits_per_byte",
    "against": RELEASED,
    "conclude": conclude,
    "presets": {
        "smoke": {"arms": (RELEASED, "no token shift", PRINTED)},
        "gpu": {
            "base": {"model": LARGE, "seq_len": 512, "steps": 3000, "optim.lr": 4e-3, "corpus": "enwik8"}, "seeds": 2,
            "swept": True,
        },
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
