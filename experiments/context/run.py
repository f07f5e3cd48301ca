"""Context: how far back a model reads, how far its state carries, and what longer training windows add (Fig. 6).

The paper's loss on the Pile falls with the context up to 2^11 tokens (Fig. 6, 7B and 14B extended to 8,192 tokens),
and section 5.2 extends windows from 1,024 to 8,192 in stages of 10, 100 and 100 billion tokens, without a control on
as many tokens. Models trained on 1,024 tokens hold their loss to about 2,500 (README of the released code).

Claims, each about a small model of bytes trained here on windows of T:
  context     the same 64 bytes cost less after 4,096 bytes of context than after T
  carrying    a state carried to 64 T bytes of a text is safe, and worth what a warm window is worth
  extension   stages of 2 T, 4 T and 8 T, as 1:10:10, lower the loss after 4,096 bytes below that of a control that
              trained on as many tokens more at T
  copy        a symbol kept over generated symbols: the longest lag solved grows with extension, not with the control

    python -m experiments.context.run
    python -m experiments.context.run --preset=gpu    6 x 512, T 512, two seeds, transformers beside
    python -m experiments.context.copying             learning rate of the copy task -> sweep.json
    python -m experiments.context.run --smoke

Cost: 11 minutes on 2 shared cores; `gpu`, estimated: 16 minutes on one H200.

context, extension: same sign where the paired difference is below 0 with its interval over documents, or over seeds if
wider; contradicted where it is above; else not resolved. carrying: same sign where what a carried state saves over one
reset every T bytes falls by less than 0.005 bits a byte from the first bytes beyond T to the last below 64 T, with its
interval; contradicted where it falls by more. copy: same sign where extension solves a longer lag than both start and
control, contradicted where a shorter one, else not resolved.

Deviations: T 256 and bytes of source code instead of 1,024 tokens of the Pile; the extension's tokens are as many as
the control's, not the same; its learning rate, which the paper does not give, is the last of the training before it.
"""

import itertools
from functools import partial

import numpy as np

from experiments import study, sweeps
from experiments.command import claim, not_run
from experiments.context import copying
from experiments.context.reading import bits_after_context, bootstrap, reach
from experiments.statistics import t_interval, told, verdict, wider

MARGIN = 0.005  # bits a byte by which the gain of a carried state may fall and still be called safe
COPIES = ("copy", "copy, extended", "copy, control")


def arm_of(name: str, base) -> dict:
    """A model at the best learning rate of compare's sweep, or between those of swept widths."""
    lr = sweeps.lr(sweeps.COMPARE, name, base.model.num_layers, base.model.dim)
    return study.flat(study.MODELS[name]) | {"optim.lr": lr}


def longer(windows, base) -> list[dict]:
    """The run of RWKV-4, then stages (windows in T, steps of as many tokens) at its last learning rate."""
    found, steps = [arm_of("rwkv4", base)], base.steps
    lr = found[0]["optim.lr"] / 10
    constant = {"optim": {"schedule": "constant", "lr": lr, "lr_end": lr, "warmup": 0.0, "decay": 0.0}}
    for factor, more in windows:
        steps += more
        shape = {"seq_len": factor * base.seq_len, "batch_size": base.batch_size // factor, "steps": steps}
        found.append(found[0] | study.flat(constant) | shape)
    return found


def arms_of(stages, others=()) -> dict:
    """RWKV-4, the same extended, its control with as many tokens more at T, and other models."""
    control = ((1, sum(steps for _, steps in stages)),)
    extended = {"extended": partial(longer, stages), "control": partial(longer, control)}
    return {"rwkv4": partial(arm_of, "rwkv4")} | extended | {arm: partial(arm_of, arm) for arm in others}


def also(task: copying.Task = copying.TASK) -> dict:
    """The copy task: windows of one length, then longer ones, or as many tokens more of the first."""
    control = ((1, sum(steps for _, steps in task.stages)),)
    more = zip(COPIES, ((), task.stages, control), strict=True)
    return {name: partial(copying.learn, task, stages) for name, stages in more}


def conclude(its, values: dict) -> dict:
    """Rows of the ledger: what context, a carried state, and longer windows are worth."""
    T = study.config_of(its).seq_len
    factor = study.arms_of(its)["extended"][-1]["seq_len"] // T
    base, extended, control = (study.runs_of(its, values, arm) for arm in ("rwkv4", "extended", "control"))
    contexts = list(base[0]["after"])
    shortest, longest, window = contexts[0], contexts[-1], max((c for c in contexts if int(c) <= T), key=int)
    after = lambda context: lambda cell: cell["after"][context]
    beyond = difference(base, after(longest), after(window))
    reset = difference(base, lambda cell: cell["carried"], lambda cell: cell["reset"])
    warm = difference(base, after(window), lambda cell: cell["reset"])
    extension = difference(extended, after(longest), after(longest), control)
    near_D, *_, far_D = np.mean([cell["gain_by_distance"] for cell in base], axis=0)
    _, *fall = bootstrap(lambda drawn: (near_D - far_D)[drawn].mean(), len(near_D))
    levels, reached = _levels_and_reach(base)
    copies = [values[name] for name in COPIES]
    windows, (first, *others) = [copy["window"] for copy in copies], [longest_solved(copy["share"]) for copy in copies]
    return {
        "ledger": [
            claim(
                "Fig. 6, loss against context",
                "falls to 2,048 tokens (7B and 14B, trained to 8,192)",
                f"trained at {T} bytes: {levels[shortest]:.3f} bits a byte after {shortest}, "
                f"{levels[window]:.3f} after {window}, from there to {longest} {told(*beyond, 4)}; 95 % of the gain "
                "within {:.0f} bytes [{:.0f}, {:.0f}]".format(*reached),
                verdict(*beyond[1:], sign=-1),
            ),
            claim(
                "Fig. 6, a state carried beyond the training length",
                "models trained at 1,024 hold to about 2,500, then rise slowly (README)",
                f"worth {told(*reset, 4)} bits a byte against a reset every {T}, of which {T} bytes of context "
                f"without more have {warm[0]:+.4f}; saves {near_D.mean():.4f} up to 4 T, {far_D.mean():.4f} from 16 T "
                "to 64 T",
                safe(*fall),
            ),
            claim(
                "Section 5.2, longer windows 1:10:10",
                "loss falls in every stage; no control",
                f"to {factor} T, minus as many tokens more at T: {told(*extension, 4)} bits a byte after {longest} "
                "bytes",
                verdict(*extension[1:], sign=-1),
            ),
            claim(
                "Section 5.2, longest lag of a copied symbol",
                "none",
                f"{first} after windows of {windows[0]}, {others[0]} after longer ones to {windows[1]}, {others[1]} "
                f"after as many tokens more at {windows[2]}",
                farther(first, *others),
            ),
        ],
        "not_run": [
            not_run(
                "Fig. 6 at 6 x 512, transformers beside", "python -m experiments.context.run --preset=gpu", hours=0.3
            ),
            not_run(
                "Fig. 6 of the released 7B and 14B",
                "python -m rwkv_jax.evaluate --model=PATH --data=FILE --seq_len=8192",
                hours=10,
                hardware="80 GB of memory",
                why="neither the weights nor the Pile were at hand",
            ),
        ],
    }


def difference(cells, of_a, of_b, others=None) -> tuple[float, float, float]:
    """Paired difference in bits a byte of cells, one a seed, or of `cells` minus `others`, and its 95 % interval: over
    documents, or over seeds where that is wider."""
    weights_D = np.array(cells[0]["targets"])
    bits_SD = np.array([np.subtract(of_a(a), of_b(b)) for a, b in zip(cells, others or cells, strict=True)])
    mean_D = bits_SD.mean(0)
    value, *over_documents = bootstrap(lambda drawn: np.average(mean_D[drawn], weights=weights_D[drawn]), len(mean_D))
    over_seeds = t_interval(np.average(bits_SD, axis=1, weights=weights_D))[1:]
    return value, *wider(over_documents, over_seeds)


def _levels_and_reach(cells):
    """Bits a byte by context, and the effective reach with its interval over documents."""
    weights_D, contexts = np.array(cells[0]["targets"]), list(cells[0]["after"])
    bits_CD = np.mean([[cell["after"][c] for c in contexts] for cell in cells], axis=0)
    level_C = lambda drawn: np.average(bits_CD[:, drawn], axis=1, weights=weights_D[drawn])
    reached = bootstrap(lambda drawn: reach([int(c) for c in contexts], level_C(drawn)), len(weights_D))
    return dict(zip(contexts, level_C(np.arange(len(weights_D))), strict=True)), reached


def longest_solved(share: dict, enough: float = 0.99) -> int:
    """The longest lag up to which all are solved; 0: none."""
    solved = itertools.takewhile(lambda lag: share[lag] >= enough, share)
    return max(map(int, solved), default=0)


def safe(low: float, high: float) -> str:
    """Verdict on a carried state whose gain falls by what the interval holds."""
    return "same sign" if high < MARGIN else "contradicted" if low > MARGIN else "not resolved"


def farther(first: int, extended: int, control: int) -> str:
    """Verdict on the longest lags that are solved."""
    most = max(first, control)
    return "same sign" if extended > most else "contradicted" if extended < most else "not resolved"


TINY = {"model": {"num_layers": 1, "dim": 16}, "seq_len": 16, "batch_size": 4, "steps": 4}
TINY_COPY = copying.Task(seq_len=8, batch_size=4, steps=4, stages=((1, 2),), lr=1e-2, lags=(4, 8))
LARGE = {"model": {"num_layers": 6, "dim": 512}, "seq_len": 512, "batch_size": 32, "steps": 6100, "corpus": "enwik8"}
CONTEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STUDY = {
    "base": {"model": {"num_layers": 2, "dim": 64}, "seq_len": 256, "batch_size": 16, "steps": 400},
    "arms": arms_of(((2, 12), (4, 120), (8, 120))),  # as 10 to 100 to 100
    "measure": partial(bits_after_context, T=256, contexts=CONTEXTS, number=192),
    "against": "rwkv4",
    "held_out": 2**40,  # all
    "also": also,
    "conclude": conclude,
    "presets": {
        "smoke": {
            "base": TINY, "arms": arms_of(((2, 2),)), "seeds": 1,
            "measure": partial(bits_after_context, T=16, contexts=(16, 32), number=4), "held_out": 2**40,
            "also": partial(also, TINY_COPY),
        },
        "gpu": {
            "base": LARGE, "arms": arms_of(((2, 183), (4, 1830), (8, 1830)), ("transformer", "transformer+shift")),
            "seeds": 2, "measure": partial(bits_after_context, T=512, contexts=(*CONTEXTS, 8192), number=1024),
        },
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
