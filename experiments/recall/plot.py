"""The figure of results.json: right answers against examples."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw the share of right answers against examples, a panel for each case."""
    figure, [axes] = figures.panels(len(results["chance"]), width=4, height=3.6)
    for axis, (case, chance) in zip(axes, results["chance"].items(), strict=True):
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":", label="one of the values in sight")
        for name, cell in results["cells"].items():
            arm, its = name.split(", ", 1)
            if its.startswith(case):
                examples, best = zip(
                    *((examples / 1000, np.max(right)) for examples, right in cell["curve"]), strict=True
                )
                axis.plot(examples, best, color=figures.COLOURS[arm], label=arm, linewidth=1.2)
        axis.set(title=case, xlabel="examples, thousands", ylim=(0, 1.03))
    axes[0].set_ylabel("answers right")
    axes[-1].legend(frameon=False, fontsize=8)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("recall")
