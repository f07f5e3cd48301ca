"""The figure of results.json: levels by tokens, FLOPs and seconds, and what lies between the arms."""

import numpy as np
from matplotlib.ticker import EngFormatter

from experiments.figures import COLOURS, MARKERS, label_ends, panels, saved, style, titled, within_decades
from experiments.results import redraw
from experiments.statistics import millions, told_row

AXES = {
    "tokens": (1e6, "training tokens, millions"),
    "flops": (1e12, "training TFLOP"),
    "seconds": (1, "training time, seconds"),
}
PAPER = 0.041  # Table 5


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, [[by_tokens, by_flops], [by_seconds, minus]] = panels(2, 2, width=5.6, height=3.9)
    levels = dict(zip(AXES, (by_tokens, by_flops, by_seconds), strict=True))
    for name, axis in levels.items():
        unit, label = AXES[name]
        for arm, points in results["points"].items():
            at = [(point[name] / unit, point["bits_per_byte"]) for point in points if point[name]]
            if len(at) > 1:
                axis.plot(*zip(*at, strict=True), **style(arm))
            elif at:
                alone = {"markersize": 6.5, "linestyle": "", "label": f"_{arm}", "zorder": 3}
                axis.plot(*at[0], **style(arm) | alone)
        axis.set(xlabel=label, ylabel="bits per byte, held out")
    base = results["study"]["base"]
    counted = results["cells"].get("counted", {}).get("budgets", {})
    tokens = [int(budget) * base["seq_len"] * base["batch_size"] / 1e6 for budget in counted]
    for name in sorted({n for row in counted.values() for n in row} - {"unigram"}):
        by_tokens.plot(tokens, [row[name] for row in counted.values()], ":", color="#888888", label=name)
    for pair, rows in results["pairs"].items():
        arm, against = pair.split(" minus ")
        if against == "transformer" and rows:
            bits, low, high = np.array(
                [[row[x] for x in ("difference", "low", "high")] for row in rows.values()], float
            ).T
            tokens = [int(tokens) / 1e6 for tokens in rows]
            minus.plot(tokens, bits, **style(arm))
            minus.fill_between(tokens, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
    minus.axhline(0, color=COLOURS["transformer"], linewidth=1, label="transformer")
    minus.axhline(PAPER, color="#888888", linestyle="--", linewidth=1, label="rwkv4, Table 5")
    minus.set(xlabel=AXES["tokens"][1], ylabel="bits per byte, minus the transformer's")
    minus.set_title("paired differences; bands: 95 %")
    for axis in (*levels.values(), minus):
        within_decades(axis.xaxis)
        label_ends(axis)
    by_seconds.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _legend(by_seconds, results["points"])
    size, corpus = f"{base['model.num_layers']} x {base['model.dim']}", base.get("corpus", "stdlib")
    titled(figure, results, _finding(results["pairs"]), f"{size}, bytes of {corpus}")
    saved(figure, path)


def _legend(axis, points) -> None:
    """Name the arms that have one budget, which have no line's end."""
    alone = [arm for arm, its in points.items() if len(its) == 1]
    for arm in alone:
        axis.plot([], [], MARKERS[arm], color=COLOURS[arm], markersize=6, label=arm)
    if alone:
        handles, names = axis.get_legend_handles_labels()
        axis.legend(handles[-len(alone) :], names[-len(alone) :], loc="upper right", title="at one budget")


def _finding(pairs) -> str:
    rows = pairs.get("rwkv4 minus transformer")
    if not rows:
        return "Bits per byte against training tokens, FLOPs and seconds"
    tokens, row = max(rows.items(), key=lambda item: int(item[0]))
    after = f"RWKV-4 minus transformer after {millions(tokens)} tokens"
    return f"{after}: {told_row(row)} bits per byte"


if __name__ == "__main__":
    redraw("perplexity")
