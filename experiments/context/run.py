"""Context: how far back a model reads, how far its state carries, and what longer training windows add (Fig. 6), for
each version of RWKV.

In the paper the loss on the Pile falls with the context up to 2^11 tokens (Fig. 6, 7B and 14B extended to 8,192
tokens). Section 5.2 extends windows from 1,024 to 8,192 in stages of 10, 100 and 100 billion tokens, without a control
on as many tokens. Models trained on 1,024 tokens hold their loss to about 2,500 (README of the released code). Later
versions on PG19, 3B, trained on 4,096 tokens (arXiv:2404.05892, Fig. 5): RWKV-4 rises beyond about 10,000 tokens, to
about 3.6 nats, RWKV-5 stays, RWKV-6 still falls, to about 2.2. RWKV-7 trained on the Pile falls beyond 4,096 tokens,
and finds pass keys 35,000 tokens back (arXiv:2503.14456, second-hand).

Claims, each about a small model of bytes trained here on windows of T:
  context     the same 64 bytes cost less after 4,096 bytes of context than after T
  carrying    a state carried over 64 T bytes of a text saves as many bits at the end as just beyond T
  extension   stages of 2 T, 4 T and 8 T, as 1:10:10, lower the loss after 4,096 bytes below that of a control that
              trained on as many tokens more at T
  copy        a symbol kept over generated symbols: the longest lag solved grows with extension, not with the control
  versions    without longer windows, the loss of RWKV-5 and 6 from T to 4,096 bytes of context falls by more, or rises
              by less, than RWKV-4's, and that of RWKV-7 falls; each copies over longer lags than RWKV-4

    python -m experiments.context.run
    python -m experiments.context.run --preset=gpu    6 x 512, T 512, two seeds, transformers beside
    python -m experiments.context.copying             learning rates of the copy task -> sweep.json
    python -m experiments.context.run --smoke

Cost: 37 minutes of one core of a Xeon, learning rates of the copy task 15; `gpu`, estimated: 16 minutes on one H200.

Verdicts:
  context, extension   same sign: the paired difference is below 0 with its interval over documents, or over seeds if
                       wider; contradicted: it is above; else not resolved. *Not comparable* if the model's reach, the
                       bytes of context that give 95 % of the gain, is below T: such a model has no use for longer
                       windows. This rule came after the run, whose reach is 102 bytes [58, 261]. Without it context is
                       not resolved, and extension contradicted
  carrying             saving: what a carried state saves over one reset every T bytes. Same sign: the saving falls by
                       less than 0.005 bits a byte, with its interval, from the first bytes beyond T to the last below
                       64 T; contradicted: it falls by more
  copy                 not resolved: one seed. This rule came after the run; before it, a longer lag gave *same sign*.
                       Without extension, another seed has 253 of 256 right at lag 512, one row less than a lag that
                       counts as solved
  versions             by the rule of context: the change of RWKV-5's and RWKV-6's loss from T to 4,096 bytes minus
                       RWKV-4's, *not comparable* too unless RWKV-4's loss rises with its interval, as in the paper;
                       and RWKV-7's own change. The longest lag copied, as a ratio to RWKV-4's over three seeds, is
                       *not comparable*: no paper has a number that a model of 2 x 64 could meet

Deviations: T 256 and bytes of source code instead of 1,024 tokens of the Pile. The extension trains on as many tokens
as the control, but not on the same ones. Its learning rate, which the paper does not give, is the last one of the
training before it. Versions differ in parameters (state: 5 D numbers a layer in RWKV-4, 2 D + 64 D after it). One seed
of each reads text.
"""

import itertools
from functools import partial

import numpy as np

from experiments import study, sweeps
from experiments.command import claim, not_run
from experiments.context import copying
from experiments.context.reading import bits_after_context, bootstrap, reach
from experiments.statistics import t_interval, told, verdict, wider

MARGIN = 0.005  # bits a byte: largest fall of a carried state's gain that is still called safe
COPIES = ("copy", "copy, extended", "copy, control")
LATER = copying.VERSIONS[1:]
SHORTEST, LONGEST = copying.TASK.lags[0], copying.TASK.lags[-1]


def arm_of(name: str, base) -> dict:
    """Return a model at the best learning rate of compare's sweep, interpolated between swept widths."""
    lr = sweeps.lr(sweeps.COMPARE, name, base.model.num_layers, base.model.dim)
    return study.flat(study.MODELS[name]) | {"optim.lr": lr}


def longer(windows, base) -> list[dict]:
    """Return the run of RWKV-4, then stages (windows in T, steps of as many tokens) at its last learning rate."""
    found, steps = [arm_of("rwkv4", base)], base.steps
    lr = found[0]["optim.lr"] / 10
    constant = {"optim": {"schedule": "constant", "lr": lr, "lr_end": lr, "warmup": 0.0, "decay": 0.0}}
    for factor, more in windows:
        steps += more
        shape = {"seq_len": factor * base.seq_len, "batch_size": base.batch_size // factor, "steps": steps}
        found.append(found[0] | study.flat(constant) | shape)
    return found


def arms_of(stages, others=()) -> dict:
    """Return RWKV-4, the same extended, its control with as many tokens more at T, and other models."""
    control = ((1, sum(steps for _, steps in stages)),)
    extended = {"extended": partial(longer, stages), "control": partial(longer, control)}
    return {"rwkv4": partial(arm_of, "rwkv4")} | extended | {arm: partial(arm_of, arm) for arm in others}


def also(task: copying.Task = copying.TASK, seeds: int = 3) -> dict:
    """Return the cells of the copy task.

    For RWKV-4: windows of one length, then longer ones, or as many tokens more of the first length. By version of RWKV
    and seed: the first length alone, where RWKV-4's first seed is the same run.
    """
    control = ((1, sum(steps for _, steps in task.stages)),)
    more = zip(COPIES, ((), task.stages, control), strict=True)
    of = {name: copying.at_its_rate(task, name) for name in copying.VERSIONS}
    by_stage = {name: partial(copying.learn, of["rwkv4"], "rwkv4", 0, stages) for name, stages in more}
    versions = itertools.product(copying.VERSIONS, range(seeds))
    learned = lambda name, seed: partial(copying.learn, of[name], name, seed, ())
    return by_stage | {copy_of(name, seed): learned(name, seed) for name, seed in versions}


def copy_of(name: str, seed: int) -> str:
    return f"copy, {name}, seed {seed}"


def conclude(its, values: dict) -> dict:
    """Return the rows of the ledger: the gains from context, a carried state, longer windows and later versions."""
    T, arms = study.config_of(its).seq_len, study.arms_of(its)
    factor = arms["extended"][-1]["seq_len"] // T
    base, extended, control = (study.runs_of(its, values, arm) for arm in ("rwkv4", "extended", "control"))
    window, longest = window_and_longest(its, base[0])
    after = lambda context: lambda cell: cell["after"][context]
    beyond = _change(its, values, "rwkv4")
    extension = difference(extended, after(longest), after(longest), control)
    near_D, *_, far_D = np.mean([cell["gain_by_distance"] for cell in base], axis=0)
    fall = bootstrap(lambda drawn: (near_D - far_D)[drawn].mean(), len(near_D))
    first, *others = (longest_solved(values[name]["share"]) for name in COPIES)
    from_window = f"from {window} to {longest} bytes of context, trained at {T}"
    rows = [
        claim(
            "Fig. 6, loss against context",
            "falls to 2,048 tokens (7B and 14B, trained to 8,192)",
            f"{told(*beyond, 4)} bits a byte {from_window}",
            falls(beyond, base, T),
        ),
        claim(
            "Fig. 6, a state carried beyond the training length",
            "models trained at 1,024 hold to about 2,500, then rise slowly (README)",
            f"saves {told(*fall, 4)} bits a byte more at T to 4 T than at 16 T to 64 T, trained at {T}",
            safe(*fall[1:]),
        ),
        claim(
            "Section 5.2, longer windows 1:10:10",
            "loss falls in every stage; no control",
            f"to {factor} T, minus a control at T: {told(*extension, 4)} bits a byte after {longest} bytes",
            falls(extension, base, T),
        ),
        claim(
            "Section 5.2, longest lag of a copied symbol",
            "longer windows help; no control",
            f"{others[0]} after windows of up to {values[COPIES[1]]['window']}, {max(first, others[1])} without",
            "not resolved",
        ),
    ]
    lags = lags_by_version(values)
    return {
        "change_beyond_a_window": {name: _change(its, values, name) for name in ("rwkv4", *LATER) if name in arms},
        "reach_bytes": _reach(base),
        "longest_lag": lags,
        "ledger": rows + _versions(its, values, from_window) + (_copied(lags) if lags else []),
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
    """Return the paired difference in bits a byte of cells, one per seed, or of `cells` minus `others`.

    Its 95 % interval is over documents, or over seeds if wider.
    """
    weights_D = np.array(cells[0]["targets"])
    bits_SD = np.array([np.subtract(of_a(a), of_b(b)) for a, b in zip(cells, others or cells, strict=True)])
    mean_D = bits_SD.mean(0)
    value, *over_documents = bootstrap(lambda drawn: np.average(mean_D[drawn], weights=weights_D[drawn]), len(mean_D))
    over_seeds = t_interval(np.average(bits_SD, axis=1, weights=weights_D))[1:]
    return value, *wider(over_documents, over_seeds)


def falls(change: tuple, cells, T: int) -> str:
    """Return the verdict on "the loss falls"; "not comparable" if the models of `cells` do not read T bytes back."""
    return verdict(*change[1:], sign=-1) if _reach(cells)[0] >= T else "not comparable"


def window_and_longest(its, cell) -> tuple[str, str]:
    """Return the contexts to compare: the longest within a training window, and the longest of all."""
    contexts = list(cell["after"])
    return max((c for c in contexts if int(c) <= study.config_of(its).seq_len), key=int), contexts[-1]


def _change(its, values, name: str, against: str | None = None) -> tuple[float, float, float]:
    """Return the change of a model's loss from a window to the longest context, or minus another's; its interval."""
    cells = study.runs_of(its, values, name)
    window, longest = window_and_longest(its, cells[0])
    after = lambda context: lambda cell: cell["after"][context]
    if not against:
        return difference(cells, after(longest), after(window))
    change = lambda cell: np.subtract(cell["after"][longest], cell["after"][window])
    return difference(cells, change, change, study.runs_of(its, values, against))


def _versions(its, values, from_window: str) -> list[dict]:
    """Return the rows of the later versions of RWKV in the study."""
    pg19 = "3B on PG19: {}, where RWKV-4 rises beyond 10,000 tokens (arXiv:2404.05892, Fig. 5)"
    goose = "falls on PG19 beyond 4,096 tokens, trained on the Pile (arXiv:2503.14456)"
    claims = {
        "rwkv5": ("RWKV-5 minus RWKV-4", pg19.format("stays"), "rwkv4"),
        "rwkv6": ("RWKV-6 minus RWKV-4", pg19.format("falls"), "rwkv4"),
        "rwkv7": ("RWKV-7", goose, None),
    }
    rows, rises, T = [], _change(its, values, "rwkv4")[1] > 0, study.config_of(its).seq_len
    for name, (what, paper, against) in claims.items():
        if name in study.arms_of(its):
            found = _change(its, values, name, against)
            ours = f"{told(*found, 4)} bits a byte {from_window}"
            cells = study.runs_of(its, values, name)
            judged = falls(found, cells, T) if not against or rises else "not comparable"
            rows.append(claim(f"Loss beyond the training length, {what}", paper, ours, judged))
    return rows


def lags_by_version(values) -> dict[str, list[int]]:
    """Return the longest lag that each version copies without longer windows, by seed; {} if none was run."""
    found = {}
    for name, value in values.items():
        if name.startswith("copy, ") and ", seed " in name:
            found.setdefault(name.split(", ")[1], []).append(longest_solved(value["share"]))
    return found


def _copied(lags: dict) -> list[dict]:
    """Return the row of RWKV-7's longest lag over RWKV-4's.

    A model that copies over no lag counts as half the shortest.
    """
    log2 = lambda name: np.log2(np.maximum(lags[name], SHORTEST / 2))
    at_least = "at least " * (max(lags["rwkv7"]) >= LONGEST)
    ours = f"{at_least}{2 ** np.mean(log2('rwkv7') - log2('rwkv4')):.2g} times as long as RWKV-4's"
    paper, run = "pass keys 8.5 T back (2.9B)", f"{len(lags['rwkv4'])} seeds"
    return [claim("Longest lag of a copied symbol, RWKV-7", paper, ours, "not comparable", run=run)]


def _reach(cells) -> tuple[float, float, float]:
    """Return the bytes of context that give 95 % of the gain, and their interval over documents."""
    weights_D, contexts = np.array(cells[0]["targets"]), list(cells[0]["after"])
    bits_CD = np.mean([[cell["after"][c] for c in contexts] for cell in cells], axis=0)
    level_C = lambda drawn: np.average(bits_CD[:, drawn], axis=1, weights=weights_D[drawn])
    return bootstrap(lambda drawn: reach([int(c) for c in contexts], level_C(drawn)), len(weights_D))


def longest_solved(share: dict) -> int:
    """Return the longest lag up to which 99 % are right at every lag; 0 if none."""
    solved = itertools.takewhile(lambda lag: share[lag] >= 0.99, share)
    return max(map(int, solved), default=0)


def safe(low: float, high: float) -> str:
    """Return the verdict on a carried state whose gain falls by an amount in the interval."""
    return "same sign" if high < MARGIN else "contradicted" if low > MARGIN else "not resolved"


TINY = {"model": {"num_layers": 1, "dim": 16}, "seq_len": 16, "batch_size": 4, "steps": 4}
TINY_COPY = copying.Task(seq_len=8, batch_size=4, steps=4, stages=((1, 2),), lr=1e-2, lags=(4, 8))
LARGE = {"model": {"num_layers": 6, "dim": 512}, "seq_len": 512, "batch_size": 32, "steps": 6100, "corpus": "enwik8"}
CONTEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STUDY = {
    "base": {"model": {"num_layers": 2, "dim": 64}, "seq_len": 256, "batch_size": 16, "steps": 400},
    "arms": arms_of(((2, 12), (4, 120), (8, 120)), LATER),  # as 10 to 100 to 100
    "measure": partial(bits_after_context, T=256, contexts=CONTEXTS, number=192),
    "against": "rwkv4",
    "held_out": 2**40,  # all
    "also": also,
    "conclude": conclude,
    "presets": {
        "smoke": {
            "base": TINY, "arms": arms_of(((2, 2),), LATER), "seeds": 1,
            "measure": partial(bits_after_context, T=16, contexts=(16, 32), number=4), "held_out": 2**40,
            "also": partial(also, TINY_COPY, 1),
        },
        "gpu": {
            "base": LARGE, "arms": arms_of(((2, 183), (4, 1830), (8, 1830)), ("transformer", "transformer+shift")),
            "seeds": 2, "measure": partial(bits_after_context, T=512, contexts=(*CONTEXTS, 8192), number=1024),
            "also": partial(also, seeds=0),
        },
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
