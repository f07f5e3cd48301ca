"""The figure of results.json: what each method gains on the new text and loses on the old."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw what each arm gains on the new text and loses on the old, against its trained parameters."""
    figure, [[axis]] = figures.panels(1, width=7.5, height=4.2)
    cells = {name.removesuffix(", seed 0"): cell for name, cell in results["cells"].items()}
    for text, rows, colour in (("new", results["table"], "#c0392b"), ("old", results["old"], "#2c3e50")):
        arms = [arm for arm in rows if arm != "none"]
        trained = [cells[arm]["trained"] for arm in arms]
        mean, low, high = np.array([[rows[arm][x] for x in ("difference", "low", "high")] for arm in arms], float).T
        label = f"{text} text: {cells['none']['texts'][text]}"
        axis.errorbar(trained, mean, [mean - low, high - mean], fmt="o", color=colour, capsize=3, label=label)
        for arm, x, y in zip(arms, trained, mean, strict=True) if text == "new" else ():
            where = {"ha": "left", "xytext": (7, 4)} if arm == "full" else {"ha": "right", "xytext": (-7, 4)}
            axis.annotate(arm, (x, y), textcoords="offset points", fontsize=8, **where)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="trained parameters", ylabel="bits per byte, change by fine-tuning")
    axis.margins(x=0.15, y=0.15)
    axis.legend(frameon=False, fontsize=8)
    figures.titled(figure, results)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("finetune")
