"""Conclusions from the cells: ratios against the law, batches at which the claims hold, rows of the ledger."""

import math

import numpy as np

from experiments.command import claim, not_run
from rwkv_jax import models

CLAIMS = ((10, 4096), (100, 32768))  # times as fast, tokens of context
CONSTANT, NOISE = 1.25, 1.5  # slowest over fastest position of RWKV-4; the ratio that a shared machine alone may cause
CACHED, SHIFTED, UNCACHED = "transformer", "transformer+shift", "transformer, no cache"
FIGURE_7, FIGURES_13_14 = 1000, 512  # tokens


def weights(num_layers: int, dim: int, vocab_size: int) -> int:
    """Return the numbers that a token of either model reads: V D + 13 D^2 L."""
    return vocab_size * dim + 13 * dim**2 * num_layers


def law(num_layers, dim, vocab_size, tokens, batch) -> float:
    """Return a cached transformer's time a token over RWKV-4's after `tokens` others, if only reads count."""
    return 1 + 2 * batch * tokens * dim * num_layers / weights(num_layers, dim, vocab_size)


def batch_for(factor, tokens, num_layers, dim, vocab_size) -> int:
    """Return the least batch at which the law gives that factor."""
    return math.ceil((factor - 1) / (law(num_layers, dim, vocab_size, tokens, 1) - 1) - 1e-9)


def cumulative(rows, tokens) -> float:
    """Return the seconds of generating `tokens` tokens of one text: piecewise linear latency, integrated."""
    at, seconds = (np.array([row[name] for row in rows], float) for name in ("position", "seconds"))
    grid = np.unique([0, *at[at < tokens], tokens])
    return float(np.trapezoid(np.interp(grid, at, seconds), grid))


def straightness(rows) -> float:
    """Return r^2 of a straight line through (position, cumulative seconds)."""
    x, y = (np.array([row[name] for row in rows], float) for name in ("position", "seconds"))
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def ratios(preset, values) -> list[dict]:
    """Return the time of a baseline's token over RWKV-4's, by shape, batch and position, beside the law."""
    found = []
    for name, shape in preset.shapes.items():
        fields = (shape.num_layers, shape.dim, shape.vocab_size)
        for batch in shape.batches:
            ours = {row["position"]: row["seconds"] for row in _rows(values, name, "rwkv4", batch)}
            for baseline in (CACHED, SHIFTED, UNCACHED):
                for row in (r for r in _rows(values, name, baseline, batch) if r["position"] in ours):
                    at = row["position"]
                    it = {"shape": name, "batch": batch, "baseline": baseline, "position": at}
                    it["ratio"] = row["seconds"] / ours[at]
                    found.append(it | ({} if baseline == UNCACHED else {"law": law(*fields, at, batch)}))
    return found


def _rows(values, name, arm, batch):
    return values.get(f"{name}, {arm}, batch {batch}", {"rows": []})["rows"]


def claimed(preset, measured) -> list[dict]:
    """Return, for each factor, the measured ratios at its length, and the batch that the law requires of every
    size."""
    found = []
    for factor, tokens in CLAIMS:
        sizes = {name: (s.num_layers, s.dim, s.vocab_size) for name, s in preset.shapes.items()}
        released = {
            name: (its["num_layers"], its["dim"], its["vocab_size"])
            for name, its in models.kind_of("rwkv4").sizes.items()
        }
        sizes |= {name: size for name, size in released.items() if size not in sizes.values()}
        its = [r for r in measured if r["position"] == tokens and r["baseline"] == CACHED]
        found.append({
            "factor": factor,
            "tokens": tokens,
            "batch_by_law": {name: batch_for(factor, tokens, *size) for name, size in sizes.items()},
            "measured": [{k: r[k] for k in ("shape", "batch", "ratio", "law")} for r in its],
        })  # fmt: skip
    return found


def conclude(preset, values) -> dict:
    measured = ratios(preset, values)
    factors = claimed(preset, measured)
    rows = [_constant(preset, values), *(_factor(its, measured) for its in factors)]
    rows += [_seconds(preset, values), _memory(preset, values)]
    rows += [_training(values)] if preset.lengths else []
    larger = not_run(
        "Figs. 7, 13, 14 at 3B and 7B, to 131,072 tokens",
        "python -m experiments.inference.run --preset=paper",
        hours=0.5,
    )
    return {
        "ledger": rows,
        "not_run": [] if "7B" in preset.shapes else [larger],
        "ratios": measured,
        "claims": factors,
    }


def _first(preset):
    name, shape = next(iter(preset.shapes.items()))
    return name, shape.batches[0]


def _constant(preset, values):
    said, worst, same = [], 1.0, True
    for name, shape in preset.shapes.items():
        for batch in shape.batches:
            its = _rows(values, name, "rwkv4", batch)
            spread = max(r["seconds"] for r in its) / min(r["seconds"] for r in its)
            worst, same = max(worst, spread), same and len({r["memory_bytes"] for r in its}) == 1
            drift = its[-1]["seconds"] / its[0]["seconds"]
            least = 1e3 * min(r["seconds"] for r in its)
            said.append(f"{name} batch {batch}: {least:.1f} ms x {spread:.2f}, last over first {drift:.2f}")
    on_time = "reproduced" if worst <= CONSTANT else "not resolved" if worst <= NOISE else "contradicted"
    return claim(
        "Table 1: a token's time and memory against context",
        "constant",
        f"slowest over fastest position {worst:.2f}",
        on_time if same else "contradicted",
        run=f"{', '.join(preset.shapes)}, 0 to {preset.positions[-1]:,} tokens",
        details=f"{'; '.join(said)}; memory {'' if same else 'not '}the same at all",
    )


def _factor(claimed, measured):
    """Return the row of one factor: the ratio at each batch, and the batches at which the factor holds."""
    factor, tokens, its = claimed["factor"], claimed["tokens"], claimed["measured"]
    said = [f"{r['shape']} batch {r['batch']}: {r['ratio']:.1f} (law {r['law']:.1f})" for r in its]
    uncached = max((r for r in measured if r["baseline"] == UNCACHED), key=lambda r: r["position"], default=None)
    holds = [f"{r['shape']} from batch {r['batch']}" for r in its if r["ratio"] >= factor]
    parts = [f"against a cache {'; '.join(said) or 'not measured'}"]
    parts.append(f"holds for {', '.join(holds)}" if holds else "holds at no batch measured")
    by_law = ", ".join(f"{name} {batch}" for name, batch in claimed["batch_by_law"].items())
    parts.append(f"by the law from batch: {by_law}")
    if uncached:
        parts.append(f"without a cache {uncached['ratio']:.0f} already after {uncached['position']:,} tokens")
    alone = [r["ratio"] for r in its if r["batch"] == 1]
    return claim(
        f"{factor} times as fast at {tokens:,} tokens",
        "not in the paper, but said of this project",
        f"{min(alone):.1f} times at batch 1, against a cache" if alone else "not measured",
        "no claim",
        run=", ".join(dict.fromkeys(r["shape"] for r in its)),
        details="; ".join(parts),
    )


def _seconds(preset, values):
    """Return the row of figures 7 and 14: seconds for 1,000 and 512 tokens.

    The first token costs the same with a cache as without.
    """
    name, batch = _first(preset)
    rows = {arm: _rows(values, name, arm, batch) for arm in ("rwkv4", CACHED, UNCACHED)}
    rows[UNCACHED] = [rows[CACHED][0], *rows[UNCACHED]]
    total = {arm: {n: cumulative(its, n) for n in (FIGURE_7, FIGURES_13_14)} for arm, its in rows.items()}
    said = lambda n: ", ".join(f"{arm} {total[arm][n]:.2f}" for arm in total)
    line, checked = [], []
    for arm in ("rwkv4", CACHED):
        its = values[f"{name}, {arm}, generated"]["rows"]
        line.append(f"{arm} {straightness(its):.4f}")
        checked.append(f"{arm} {its[-1]['seconds'] / cumulative(rows[arm], its[-1]['position']):.2f}")
    ours, cached = total["rwkv4"][FIGURE_7], total[CACHED][FIGURE_7]
    verdict = "reproduced" if cached >= 3 * ours else "same sign" if cached > ours else "contradicted"
    return claim(
        "Figs. 7, 14: seconds for 1,000 and 512 tokens",
        "3B, 1,000 tokens: RWKV-4 10 to 15 s in a straight line, transformers 45 to 65 s",
        f"transformer with a cache {cached / ours:.2f} times RWKV-4's seconds",
        verdict if name == "3B" else "not comparable",
        run=f"{name}, batch {batch}",
        details=f"1,000 tokens: {said(FIGURE_7)}; 512: {said(FIGURES_13_14)}; r^2 of a line {', '.join(line)}; "
        f"really generated over integral {', '.join(checked)}",
    )


def _memory(preset, values):
    name, batch = _first(preset)
    found = {
        arm: row["memory_bytes"]
        for arm in ("rwkv4", CACHED, UNCACHED)
        for row in _rows(values, name, arm, batch)
        if row["position"] == FIGURES_13_14
    }
    least = min(found, key=found.get) if found else None
    said = ", ".join(f"{arm} {n / 2**20:.2f} MiB" for arm, n in found.items()) or f"not at {FIGURES_13_14} tokens"
    return claim(
        "Fig. 13: memory for 512 tokens, without parameters",
        "RWKV-4 least: about 1 GB on a CPU, transformers to 13 GB",
        f"{found[CACHED] / found['rwkv4']:.0f} times less than a transformer with a cache" if found else said,
        {None: "not resolved", "rwkv4": "reproduced"}.get(least, "contradicted"),
        run=f"{name}, batch {batch}",
        details=said,
    )


def _training(values):
    """Return the row of Table 1's training half: tokens/s and temporary memory of the shortest and longest windows."""
    start = "training, "
    its = {name.removeprefix(start): cell["rows"] for name, cell in values.items() if name.startswith(start)}
    ends = {arm: (rows[0], rows[-1]) for arm, rows in its.items()}
    speed = {arm: last["tokens_per_second"] / first["tokens_per_second"] for arm, (first, last) in ends.items()}
    said = ", ".join(
        f"{arm} {last['tokens_per_second']:,.0f} tokens/s, {speed[arm]:.2f} of T {first['T']:,}'s, "
        f"{first['temporary_bytes'] / 2**20:,.0f} to {last['temporary_bytes'] / 2**20:,.0f} MiB"
        for arm, (first, last) in ends.items()
    )
    ours, theirs = max(share for arm, share in speed.items() if "rwkv4" in arm), speed[CACHED]
    first, last = ends[CACHED]
    return claim(
        "Table 1: training against T, at equal B T",
        "time O(T d) against O(T^2 d)",
        f"{ours:.2f} of its tokens/s kept, the transformer {theirs:.2f}",
        "reproduced" if ours >= 0.75 and theirs < ours else "same sign" if theirs < ours else "contradicted",
        run=f"T {first['T']:,} to {last['T']:,}",
        details=f"at T {last['T']:,}: {said} (attention in blocks: no T x T anywhere)",
    )
