"""The figure of results.json: right answers against examples."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw

COLUMNS = 4


def draw(results: dict, path: Path) -> None:
    """Draw the share of right answers against examples, a panel for each case."""
    cases = results["chance"]
    rows = -(-len(cases) // COLUMNS)
    figure, axes = figures.panels(-(-len(cases) // rows), rows, width=4, height=3.6)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    for axis, (case, chance) in zip(axes.flat, cases.items(), strict=False):
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":", label="one of the values in sight")
        for name, cell in results["cells"].items():
            arm, its = name.split(", ", 1)
            if its.startswith(case):
                examples, best = zip(
                    *((examples / 1000, np.max(right)) for examples, right in cell["curve"]), strict=True
                )
                axis.plot(examples, best, color=figures.COLOURS[arm], label=arm, linewidth=1.2)
        axis.set(title=case, xlabel="examples, thousands", ylabel="answers right", ylim=(0, 1.03))
        axis.legend(frameon=False, fontsize=7)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("recall")
