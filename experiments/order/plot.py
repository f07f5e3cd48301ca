"""The figure of `results.json`: accuracy against the number of pairs, asked first and last, a panel for each arm."""

import numpy as np

from experiments.figures import plt, saved


def draw(results, path) -> None:
    """Write the figure as PNG."""
    pairs = results["study"]["base"]["pairs"]
    arms = list(dict.fromkeys(name.split(", ")[0] for name in results["accuracy"]))
    figure, axes = plt.subplots(1, len(arms), figsize=(4 * len(arms), 3.6), layout="constrained", sharey=True)
    for axis, arm in zip(axes, arms, strict=True):
        axis.plot(pairs, 1 / np.array(pairs), color="grey", linewidth=0.8, linestyle=":", label="chance")
        for order, colour in (("first", "#c0392b"), ("last", "#2c3e50")):
            by_seed = zip(*(results["accuracy"][f"{arm}, n {n}"][order] for n in pairs), strict=True)
            for i, right in enumerate(by_seed):
                label = f"question {order}" if i == 0 else None
                axis.plot(pairs, right, "o-", color=colour, label=label, linewidth=1, markersize=3)
        axis.set_xscale("log", base=2)
        axis.set(title=arm, xlabel="pairs", ylim=(0, 1.03), xticks=pairs, xticklabels=pairs)
    axes[0].set_ylabel("answers right")
    axes[0].legend(frameon=False, fontsize=8)
    saved(figure, path)
