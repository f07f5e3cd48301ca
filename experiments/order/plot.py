"""The figure of results.json: accuracy against the number of pairs."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.order.run import ARMS
from experiments.results import redraw

ORDERS = {"first": {"color": "#d55e00", "marker": "o"}, "last": {"color": "#0072b2", "marker": "s"}}


def draw(results: dict, path: Path) -> None:
    """Draw accuracy against the number of pairs, asked first and last, a panel for each arm."""
    pairs = results["study"]["base"]["pairs"]
    figure, [axes] = figures.panels(len(ARMS), width=4.2, height=3.7, sharey=True)
    for axis, arm in zip(axes, ARMS, strict=True):
        axis.plot(pairs, 1 / np.array(pairs), color="#888888", linestyle=":", label="chance")
        for order, style in ORDERS.items():
            right_NS = np.array([results["accuracy"][f"{arm}, n {n}"][order] for n in pairs])
            axis.plot(pairs, right_NS, linewidth=0.6, **style | {"markersize": 3})
            axis.plot(pairs, right_NS.mean(1), **style | {"marker": ""}, label=f"question {order}")
        axis.set_xscale("log", base=2)
        axis.set(title=arm, xlabel="pairs", ylim=(0, 1.03), xticks=pairs, xticklabels=pairs)
        figures.label_ends(axis)
    axes[0].set_ylabel("answers right, share")
    first, last = (np.mean(results["accuracy"][f"{ARMS[0]}, n {pairs[-1]}"][order]) for order in ORDERS)
    finding = (
        f"{ARMS[0]} at {pairs[-1]} pairs: {first:.2f} right where the question is first, {last:.2f} where it is last"
    )
    figures.titled(figure, results, finding, "thick: mean over seeds; thin: seeds")
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("order")
