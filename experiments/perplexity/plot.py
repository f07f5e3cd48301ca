"""The figure of results.json: levels by tokens, FLOPs and seconds, and what lies between the arms."""

import numpy as np
from matplotlib.ticker import LogLocator

from experiments.figures import COLOURS, panels, saved, titled
from experiments.results import redraw

AXES = {"tokens": (1e6, "training tokens, millions"), "flops": (1e12, "training TFLOP"), "seconds": (1, "seconds")}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, [axes] = panels(4, width=3.75, height=3.9)
    for axis, (name, (unit, label)) in zip(axes[:3], AXES.items(), strict=True):
        for arm, points in results["points"].items():
            at = [(point[name] / unit, point["bits_per_byte"]) for point in points if point[name]]
            if at:
                axis.plot(*zip(*at, strict=True), "o-" if len(at) > 1 else "s", color=COLOURS[arm], label=arm)
        axis.set(xscale="log", xlabel=label)
    base = results["study"]["base"]
    counted = results["cells"].get("counted", {}).get("budgets", {})
    tokens = [int(budget) * base["seq_len"] * base["batch_size"] / 1e6 for budget in counted]
    for name in sorted({n for row in counted.values() for n in row} - {"unigram"}):
        levels = [row[name] for row in counted.values()]
        axes[0].plot(tokens, levels, ":", color="grey", linewidth=1)
        axes[0].annotate(name, (tokens[-1], levels[-1]), color="grey", fontsize=8, va="bottom", ha="right")
    axes[0].set_ylabel("bits per byte, held out, after the decay")
    axes[0].legend(frameon=False, fontsize=8)
    for pair, rows in results["pairs"].items():
        arm, against = pair.split(" minus ")
        if against == "transformer":
            bits, low, high = np.array(
                [[row[x] for x in ("difference", "low", "high")] for row in rows.values()], float
            ).T
            tokens = [int(tokens) / 1e6 for tokens in rows]
            axes[3].plot(tokens, bits, "o-", color=COLOURS[arm])
            axes[3].fill_between(tokens, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
    axes[3].axhline(0, color=COLOURS["transformer"], linewidth=1)
    axes[3].axhline(0.041, color="grey", linestyle="--", linewidth=1)
    axes[3].annotate("Table 5", (1, 0.041), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes[3].set(xscale="log", xlabel=AXES["tokens"][1], ylabel="bits per byte minus the transformer's")
    for axis in axes:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    size, corpus = f"{base['model.num_layers']} x {base['model.dim']}", base.get("corpus", "stdlib")
    titled(figure, results, f"{size}, bytes of {corpus}")
    saved(figure, path)


if __name__ == "__main__":
    redraw("perplexity")
