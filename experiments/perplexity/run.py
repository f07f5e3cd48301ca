"""Bits per byte of RWKV by generation against a transformer of equal size (Table 5), by tokens, FLOPs and seconds.

Claim (Table 5, enwik8, 12 x 512): the transformer predicts better, 1.137 against 1.178 bits per character, which is
+0.041 for RWKV-4. Here every arm has one trunk of constant learning rate, from which runs branch at six budgets and
decay, on the same batches from the same seeds. Arms: RWKV-4, the transformer, RWKV-7, and the transformer with RWKV's
token shift; at one budget RWKV-5.2, RWKV-6 and an LSTM. N-grams and xz on the same bytes are reference levels.

    python -m experiments.perplexity.run                   4 x 128, T 512, 1 to 34 M tokens of classic-books
    python -m experiments.perplexity.run --kept            the same from the finished runs
    python -m experiments.perplexity.run --preset=slice    6 x 512, 100 M tokens, three arms: see slice.sh
    python -m experiments.perplexity.run --preset=gpu --text=enwik8      Table 5's shape, 1.7 epochs
    python -m experiments.perplexity.run --preset=paper --text=enwik8    Table 5's shape, 40 epochs

`missing` in results.json lists the runs that are still to be done.
Cost: cpu 9 hours of 2 cores, each run survives a kill; estimated: slice 11 minutes and gpu 48 of one H200, paper 12
GPU hours.
Effect: RWKV-4 minus transformer after the largest budget, disjoint windows of the training length for both, paired
(`study.compared`).
  reproduced       the interval contains +0.041 and not 0
  same sign        the interval is above 0
  contradicted     the interval is below 0
  not resolved     the interval contains 0, or there is one seed
  not comparable   another shape or corpus, or less than an epoch of 90 MB, or a transformer that does not beat a
                   Witten-Bell 6-gram of the same bytes: such a run could not have reproduced Table 5. Nor can one
                   budget against the LSTM: the paper claims that RWKV scales as LSTMs do not
  no claim         the paper has no such arm
Intervals: over documents, or over seeds where those are wider. The spread of seeds is that of all arms at the budget
with two seeds; one seed at another budget is taken to spread as much. cpu resolves about 0.010 bits a byte with one
seed, 0.007 with two; `slice`, of one seed, has intervals over documents alone.
Trend: the difference at each budget against log2 of its tokens, on a straight line through the budgets at which both
arms beat the 6-gram, as decided before the largest had run. It says which larger budget would decide the sign at this
width, not what 12 x 512 would give. Trend and crossings are of the seeds that all budgets have.
Deviations: classic-books, not enwik8; bytes, not characters; learning rates of each arm from sweeps of 120 to 160
steps on source code (experiments/compare; the LSTM's is here), not 6e-4 for all, and beyond 4 x 128 interpolated down
to the released model's; one Adam for all (RWKV-7's own epsilon of 1e-18 changed it by +0.013 at 2 x 64, in a trial);
LN0 in all arms, after RWKV-4's small embedding or, in RWKV-5, 6 and 7, their own smaller one (RWKV-4's changed RWKV-7
by -0.008 [-0.018, +0.003] at 2 x 64, see experiments/ablations_rwkv7); less than an epoch. `gpu` and `paper` have
Table 5's weight decay and dropout, the latter on the embedding and the residual stream, as in RWKV-v4neo.
Seconds are of training steps alone, timed apart from the runs on the hardware of the cell `speed`.
"""

import itertools
import math
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

import rwkv_jax
from experiments import measures, statistics, study, sweeps
from experiments.command import claim, not_run
from experiments.compare.run import counted_baselines
from experiments.measures import level
from experiments.perplexity import trend
from rwkv_jax import data, train
from rwkv_jax.data import batches
from rwkv_jax.data.tokenizers import get_tokenizer
from rwkv_jax.generate import generate_texts
from rwkv_jax.train import optim

SWEEP = Path(__file__).with_name("sweep.json")  # for the LSTM, which compare's sweep lacks
MAIN = ("rwkv4", "rwkv7", "transformer", "transformer+shift")
TABLE_5_ARMS = ("rwkv4", "transformer", "transformer+shift")
OTHERS = ("rwkv5", "rwkv6", "lstm")
PAPER = 0.041  # bits per character, RWKV-4 1.178 minus transformer 1.137 (Table 5)
SHAPE, EPOCH = (12, 512), 9e7  # tokens, of enwik8's training split
CLAIMED = (
    "rwkv4 minus transformer",
    "rwkv4 minus transformer+shift",
    "rwkv7 minus transformer+shift",
    "rwkv7 minus rwkv4",
    "rwkv5 minus rwkv4",
    "rwkv6 minus rwkv5",
    "rwkv7 minus rwkv6",
    "rwkv4 minus lstm",
)
CLAIM = {"rwkv4 minus transformer": "Table 5: RWKV-4 minus transformer", "rwkv4 minus lstm": "RWKV-4 minus LSTM"}
PAIRS = (
    ("rwkv4", "transformer"),
    ("rwkv7", "transformer"),
    ("rwkv4", "transformer+shift"),
    ("rwkv7", "transformer+shift"),
    ("transformer+shift", "transformer"),
    ("rwkv7", "rwkv4"),
    ("rwkv5", "rwkv4"),
    ("rwkv6", "rwkv5"),
    ("rwkv7", "rwkv6"),
    ("rwkv4", "lstm"),
)


def arm_of(name: str, base) -> dict:
    """Return an architecture at the best learning rate of its sweep, interpolated between swept widths."""
    lr = sweeps.lr(SWEEP, name, base.model.num_layers, base.model.dim) or base.optim.lr
    return study.flat(study.MODELS[name]) | {"optim.lr": lr}


def budgets_of(arm: str, seed: int) -> tuple:
    """Return all budgets for the first seed of the main arms, otherwise the one of 8 M tokens."""
    return BUDGETS if arm in MAIN and not seed else (AT_8M,)


def sample(model, params, corpus) -> dict:
    """Return 300 bytes that the model generates after the first words of a held-out book, with seed 0."""
    start = corpus.test.tokens[1:65].astype(np.uint8).tobytes().decode(errors="replace")
    [text] = generate_texts(model, params, [start], get_tokenizer("bytes"), max_new_tokens=300, seed=0).texts
    return {"sample": text}


def counted(budgets, config, folder) -> dict:
    """Return the bits per byte of n-grams and xz on the bytes of seed 0, by budget, as reference levels."""
    test = measures.held_out(config, TEST_BYTES).test
    shape = {"seq_len": config.seq_len, "batch_size": config.batch_size}
    stream = batches.dataset(data.prepare(config.corpus).train.tokens, **shape, seed=0)
    rows = {}
    for budget in budgets:
        seen_NT = np.concatenate([stream[i]["tokens"] for i in range(budget)]).astype(np.uint8)
        nats, xz = counted_baselines(seen_NT, test)
        rows[str(budget)] = {name: round(level(n, test), 5) for name, n in nats.items()} | {"xz": round(xz, 5)}
    return {"budgets": rows}


def speed(arms, config, folder, rounds: int = 5) -> dict:
    """Return the training tokens a second of every arm, from median step times; the arms take turns."""
    tokens = np.random.default_rng(0).integers(1, 256, (config.batch_size, config.seq_len + 1), dtype=np.int32)
    batch = {"tokens": tokens, "mask": np.ones((config.batch_size, config.seq_len), bool)}
    tx, steps, states, seconds = optim.optimiser(weight_decay=config.optim.weight_decay), {}, {}, {}
    fields = {name: config.model[name] for name in ("vocab_size", "num_layers", "dim", "dtype", "dropout")}
    for arm in arms:
        model = rwkv_jax.build(**fields, **study.MODELS[arm]["model"])
        steps[arm] = jax.jit(train.make_step(model, tx), donate_argnums=0)
        states[arm], seconds[arm] = jax.jit(train.make_init(model, tx))(jax.random.key(0)), []
    for _ in range(1 + rounds):
        for arm in steps:
            began = time.perf_counter()
            states[arm], values = steps[arm](states[arm], batch, np.float32(1e-4))
            jax.block_until_ready(values)
            seconds[arm].append(time.perf_counter() - began)
    of_step = {arm: float(np.median(times[1:])) for arm, times in seconds.items()}  # the first compiles
    return {"tokens_per_second": {arm: round(tokens[:, 1:].size / s) for arm, s in of_step.items()}}


def also(arms, budgets) -> dict:
    return {"speed": partial(speed, arms), "counted": partial(counted, budgets)}


def points_of(its, values: dict, arm: str) -> list[dict]:
    """Return the level of an arm after each budget, with its tokens, FLOPs and seconds."""
    rate, found = values.get("speed", {}).get("tokens_per_second", {}).get(arm), []
    for budget in its.budgets:
        if runs := study.runs_of(its, values, arm, budget):
            tokens = runs[0]["tokens"]
            cost = {"budget": budget, "tokens": tokens, "flops": runs[0]["flops_per_token"] * tokens}
            bits = {name: float(np.mean([run[name] for run in runs])) for name in ("bits_per_byte", "best_practice")}
            found.append(cost | {"seeds": len(runs), "seconds": rate and tokens / rate} | bits)
    return found


def gaps_of(its, values: dict, arm: str, against: str) -> dict[int, float]:
    """Return the difference of two arms by tokens, in the mean over the seeds that all budgets of both have."""
    by_seed = {}
    for budget, seed in itertools.product(study.budgets_done(its, values), study.seeds_of(its)):
        both = [values.get(study.name_of(name, seed, budget)) for name in (arm, against)]
        if all(both):
            its_own, other = both
            by_seed.setdefault(its_own["tokens"], {})[seed] = its_own["bits_per_byte"] - other["bits_per_byte"]
    seeds = set.intersection(*map(set, by_seed.values())) if by_seed else set()
    return {tokens: float(np.mean([gaps[seed] for seed in seeds])) for tokens, gaps in by_seed.items() if seeds}


def resolved_of(rows: dict, gaps: dict) -> set[int]:
    """Return the tokens at which the interval of a difference excludes 0, on the side of its common seeds."""
    known = {tokens: row for tokens, row in rows.items() if tokens in gaps and row["low"] is not None}
    return {tokens for tokens, row in known.items() if row["low"] * row["high"] > 0 and row["low"] * gaps[tokens] > 0}


def conclude(its, values: dict) -> dict:
    """Return paired differences at every budget, their crossings, the trend, and the rows of the ledger."""
    config, done = study.config_of(its), study.budgets_done(its, values)
    arms, tokens_of = study.arms_of(its), {budget: budget * config.batch_size * config.seq_len for budget in done}
    points = {arm: points_of(its, values, arm) for arm in arms}
    pairs = {}
    for a, b in (pair for pair in PAIRS if set(pair) <= set(arms)):
        rows = {tokens_of[budget]: study.paired(its, values, a, b, budget=budget) for budget in done}
        pairs[f"{a} minus {b}"] = {tokens: row for tokens, row in rows.items() if row}
    gaps = {pair: gaps_of(its, values, *pair.split(" minus ")) for pair in pairs}
    counted = values.get("counted", {}).get("budgets", {})
    ngrams = {int(b): next(x for name, x in row.items() if name.endswith("-gram")) for b, row in counted.items()}
    is_behind = lambda point: point["budget"] in ngrams and point["bits_per_byte"] >= ngrams[point["budget"]]
    behind = {arm: [point["tokens"] for point in filter(is_behind, its)] for arm, its in points.items()}
    unranked = {tokens for arm in ("rwkv4", "transformer") for tokens in behind.get(arm, ())}
    fitted = {tokens: gap for tokens, gap in gaps.get("rwkv4 minus transformer", {}).items() if tokens not in unranked}
    spread = study.spread_of(its, values, "bits_per_byte")
    seeds = min((pairs["rwkv4 minus transformer"][tokens]["seeds"] for tokens in fitted), default=1)
    of_gaps = spread and spread._replace(deviation=spread.deviation / math.sqrt(seeds))
    return {
        "points": points,
        "pairs": pairs,
        "overtakes": {pair: trend.crossings(of, resolved_of(pairs[pair], of)) for pair, of in gaps.items()},
        "spread": spread and spread._asdict(),
        "behind_the_6-gram_until": {arm: max(tokens, default=0) for arm, tokens in behind.items()},
        "trend": trend.trend(fitted, PAPER, of_gaps),
        "ledger": rows_of(config, pairs, behind["transformer"], bool(ngrams)),
        "not_run": not_run_of(config),
    }


def rows_of(config, pairs: dict, behind: list[int], is_counted: bool) -> list[dict]:
    """Return the rows of the ledger: each pair at the largest budget that both arms have.

    Args:
        behind: tokens after which the transformer is behind the 6-gram; unknown unless `is_counted`.
    """
    says = {
        "rwkv4 minus transformer": (f"{PAPER:+.3f} at 12 x 512", PAPER, 1),
        "rwkv4 minus lstm": ("RWKV scales as LSTMs do not; no number", None, -1),
    }
    rows = []
    for pair in filter(pairs.get, CLAIMED):
        tokens, row = max(pairs[pair].items())
        paper, size, sign = says.get(pair, ("no such arm", None, None))
        is_shape = (config.model.num_layers, config.model.dim) == SHAPE and config.corpus == "enwik8"
        is_learned = tokens >= EPOCH and is_counted and tokens not in behind
        verdict = "no claim" if sign is None else "not comparable"
        if size and is_shape and is_learned:
            interval = (row["low"], row["high"]) if row["seeds"] > 1 else (None, None)
            verdict = statistics.verdict(*interval, sign, size)
        run = f"{config.model.num_layers} x {config.model.dim}, {statistics.millions(tokens)} tokens, "
        run += f"{row['seeds']} seed" + "s" * (row["seeds"] > 1)
        ours = statistics.told_row(row)
        rows.append(claim(f"{CLAIM.get(pair, pair)}, bits a byte", paper, ours, verdict, run=run))
    return rows


def not_run_of(config) -> list[dict]:
    if config.model.dim >= 512:
        return []
    command = "python -m experiments.perplexity.run --preset={} --text=enwik8"
    larger = (
        ("Table 5 at 6 x 512, 100 M tokens", "experiments/perplexity/slice.sh run OUT", 0.2),
        ("Table 5 at its shape, 1.7 epochs", command.format("gpu"), 0.8),
        ("Table 5 at its shape, 40 epochs", command.format("paper"), 12),
    )
    return [not_run(what, command, hours, "one H200", "no GPU at hand") for what, command, hours in larger]


def preset(budgets: tuple, seeds: int = 2, are_counted: bool = True, **base) -> dict:
    """Return a preset for a GPU, with the arms of Table 5 and the transformer with token shift.

    Args:
        are_counted: whether n-grams count the bytes too, which takes minutes in which the GPU is idle.
    """
    large = {"model": {"num_layers": 12, "dim": 512, "dtype": "bfloat16"}, "seq_len": 1024, "batch_size": 16}
    return {
        "base": study.flat(large) | {"optim.warmup": 0.01, "optim.lr": 1e-3} | base,
        "arms": TABLE_5_ARMS,
        "seeds": seeds,
        "budgets": budgets,
        "budgets_of": None,
        "held_out": 2**20,
        "also": partial(also, TABLE_5_ARMS, budgets if are_counted else ()),
    }


TEST_BYTES, AT_8M = 2**17, 2048
BUDGETS = (256, 512, 1024, AT_8M, 4096, 8192)  # steps of 4,096 tokens
WARMUP = 16 / BUDGETS[-1]  # share of the largest budget: 16 steps of all
BASE = {
    "model": {"num_layers": 4, "dim": 128}, "corpus": "classic-books", "seq_len": 512, "batch_size": 8,
    "optim.warmup": WARMUP,
}  # fmt: skip
TABLE_5 = {"model.dropout": 0.1, "optim.weight_decay": 0.1}
STUDY = {
    "base": BASE,
    "arms": {arm: partial(arm_of, arm) for arm in (*MAIN, *OTHERS)},
    "seeds": 2,
    "measure": ("bits_per_byte", "best_practice", sample),
    "against": "transformer",
    "budgets": BUDGETS,
    "budgets_of": budgets_of,
    "is_pooled": True,
    "sweep": study.Sweep(known=sweeps.COMPARE),
    "held_out": TEST_BYTES,
    "also": partial(also, (*MAIN, *OTHERS), BUDGETS),
    "conclude": conclude,
    "presets": {
        "smoke": {
            "arms": MAIN, "seeds": 1, "budgets": (10, 20), "budgets_of": None, "also": partial(also, MAIN, (10, 20)),
            "base": {"corpus": "stdlib", "optim.warmup": 0.05},
        },
        "slice": preset(
            (1526, 6104), seeds=1, are_counted=False,
            **{"model.num_layers": 6, "seq_len": 512, "batch_size": 32},
        ),
        "gpu": preset((1144, 2289, 4578, 9155), **TABLE_5),
        "paper": preset((13733, 54930, 219720), **TABLE_5, **{"optim.lr_end": 1e-5}),
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
