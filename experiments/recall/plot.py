"""The figure of results.json: right answers against examples."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw

COLUMNS = 3
REACHED = "examples_to_0.9"


def draw(results: dict, path: Path) -> None:
    """Draw the share of right answers against examples, a panel for each case."""
    cases = results["chance"]
    rows = -(-len(cases) // COLUMNS)
    figure, axes = figures.panels(-(-len(cases) // rows), rows, width=4.4, height=3.5)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    for axis, (case, chance) in zip(axes.flat, cases.items(), strict=False):
        if chance < 1:
            axis.axhline(chance, color="#888888", linewidth=0.8, linestyle=":", label="1 / n")
        for name, cell in results["cells"].items():
            arm, its = name.split(", ", 1)
            if its.startswith(case):
                examples, best = zip(
                    *((examples / 1000, np.max(right)) for examples, right in cell["curve"]), strict=True
                )
                marks = {"markersize": 3.5, "markevery": max(1, len(best) // 8)}
                axis.plot(examples, best, **figures.style(arm) | marks)
        axis.set(title=case, xlabel="examples, thousands", ylabel="answers right, share", ylim=(0, 1.03))
        figures.label_ends(axis)
    figures.titled(figure, results, _finding(results[REACHED]), "pairs n among T tokens, width D")
    figures.saved(figure, path)


def _finding(examples: dict) -> str:
    """Say in how many of its cases each arm has 0.9 of the answers right."""
    by_arm = {}
    for case in examples.values():
        for arm, found in case.items():
            by_arm.setdefault(arm, []).append(found is not None)
    told = ", ".join(f"{arm} {sum(found)} of {len(found)}" for arm, found in by_arm.items())
    return f"Cases with 0.9 of the answers right: {told}"


if __name__ == "__main__":
    redraw("recall")
