"""The figure of results.json: levels by tokens, FLOPs and seconds, and what lies between the arms.

python -m experiments.perplexity.plot [results.json [figure.png]]
"""

import numpy as np
from matplotlib.ticker import LogLocator

from experiments.figures import COLOURS, main, plt, saved

AXES = {"tokens": (1e6, "training tokens, millions"), "flops": (1e12, "training TFLOP"), "seconds": (1, "seconds")}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained")
    for axis, (name, (unit, label)) in zip(axes[:3], AXES.items(), strict=True):
        for arm, its in results["arms"].items():
            x = np.array([row[name] for row in its["budgets"]]) / unit
            axis.plot(
                x, [row["windows"]["bits_per_byte"] for row in its["budgets"]], "o-", color=COLOURS[arm], label=arm
            )
        axis.set(xscale="log", xlabel=label)
    counted = {n for row in results["counted"].values() for n in row} - {"unigram"}
    for name in sorted(counted):
        levels = [row[name] for row in results["counted"].values()]
        tokens = [row["tokens"] / 1e6 for row in results["arms"]["rwkv4"]["budgets"]]
        axes[0].plot(tokens, levels, ":", color="grey", linewidth=1)
        axes[0].annotate(name, (tokens[1], levels[1]), color="grey", fontsize=8, va="bottom")
    axes[0].set_ylabel("bits per byte, held out, after the decay")
    axes[0].legend(frameon=False, fontsize=8)
    for arm, its in results["arms"].items():
        rows = [
            (row["tokens"] / 1e6, row["windows"]["minus"]["transformer"])
            for row in its["budgets"]
            if arm != "transformer"
        ]
        if rows:
            x, y = [r[0] for r in rows], [r[1]["bits_per_byte"] for r in rows]
            low, high = (
                [r[1][end] if r[1][end] is not None else r[1]["bits_per_byte"] for r in rows]
                for end in ("low", "high")
            )
            axes[3].plot(x, y, "o-", color=COLOURS[arm])
            axes[3].fill_between(x, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
    axes[3].axhline(0, color=COLOURS["transformer"], linewidth=1)
    axes[3].axhline(0.041, color="grey", linestyle="--", linewidth=1)
    axes[3].annotate("Table 5", (1, 0.041), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes[3].set(xscale="log", xlabel=AXES["tokens"][1], ylabel="bits per byte minus the transformer's")
    for axis in axes:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    fields, stamp = results["fields"], results["stamp"]
    figure.suptitle(
        f"{fields['num_layers']} x {fields['dim']}, bytes of {results['corpus']['name']}; {stamp['devices'][0]}, "
        f"{stamp['date']}",
        fontsize=10,
    )
    saved(figure, path)


if __name__ == "__main__":
    main(draw, __file__)
