"""The figure of `results.json`: accuracy at the questions against examples, a panel for each case."""

import numpy as np

from experiments.figures import COLOURS, plt, saved


def draw(results, path) -> None:
    """Write the figure as PNG."""
    chances = results["chance"]
    figure, axes = plt.subplots(1, len(chances), figsize=(4 * len(chances), 3.6), layout="constrained", squeeze=False)
    for axis, (case, chance) in zip(axes[0], chances.items(), strict=True):
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":", label="one of the values in sight")
        for name, cell in results["cells"].items():
            arm, its = name.split(", ", 1)
            if its.startswith(case):
                examples, right = zip(*cell["curve"], strict=True)
                best = np.max(np.reshape(right, (len(right), -1)), axis=1)
                axis.plot(np.array(examples) / 1000, best, color=COLOURS[arm], label=arm, linewidth=1.2)
        axis.set(title=case, xlabel="examples, thousands", ylim=(0, 1.03))
    axes[0, 0].set_ylabel("answers right")
    axes[0, -1].legend(frameon=False, fontsize=8)
    saved(figure, path)
