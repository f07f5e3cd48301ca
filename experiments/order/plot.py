"""The figure of results.json: accuracy against the number of pairs."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.order.run import ARMS
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw accuracy against the number of pairs, asked first and last, a panel for each arm."""
    pairs = results["study"]["base"]["pairs"]
    figure, [axes] = figures.panels(len(ARMS), width=4, height=3.6, sharey=True)
    for axis, arm in zip(axes, ARMS, strict=True):
        axis.plot(pairs, 1 / np.array(pairs), color="grey", linewidth=0.8, linestyle=":", label="chance")
        for order, colour in (("first", "#c0392b"), ("last", "#2c3e50")):
            right_NS = [results["accuracy"][f"{arm}, n {n}"][order] for n in pairs]
            label = [f"question {order}", *[None] * (len(right_NS[0]) - 1)]
            axis.plot(pairs, right_NS, "o-", color=colour, label=label, linewidth=1, markersize=3)
        axis.set_xscale("log", base=2)
        axis.set(title=arm, xlabel="pairs", ylim=(0, 1.03), xticks=pairs, xticklabels=pairs)
    axes[0].set_ylabel("answers right")
    axes[0].legend(frameon=False, fontsize=8)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("order")
