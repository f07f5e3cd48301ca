"""The figure of results.json: accuracy of the last token against the length of a word."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw

COLOURS = figures.COLOURS | {"rwkv7 (removal 2)": "#8e44ad"}
QUESTION = "For how many elements does each model follow a product in a group? Bands: seeds"


def draw(results: dict, path: Path) -> None:
    """Draw a panel for each group and depth: the mean of a model's seeds, and a band from the least to the most."""
    panels = {}
    for name, cell in results["cells"].items():
        panel, model = name.rsplit(", seed ", 1)[0].split(", ")
        panels.setdefault(panel, {}).setdefault(model, []).append(cell)
    trained = results["study"]["base"]["seq_len"]
    figure, [axes] = figures.panels(len(panels), width=3.6, height=3.6, sharey=True)
    for axis, (panel, models) in zip(axes, panels.items(), strict=True):
        group, _, depth = panel.partition(" x ")
        for model, cells in models.items():
            right_ST = np.array([cell["right"] for cell in cells])
            length_T, color = np.arange(1, right_ST.shape[1] + 1), COLOURS[model]
            axis.fill_between(length_T, right_ST.min(0), right_ST.max(0), color=color, alpha=0.2, linewidth=0)
            axis.plot(length_T, right_ST.mean(0), color=color, label=model, linewidth=1.2)
        axis.axvline(trained, color="grey", linewidth=0.8)
        axis.axhline(results["chance"][group], color="grey", linewidth=0.8, linestyle=":")
        title = f"{group}, {depth} layer{'s' * (depth != '1')}"
        axis.set(title=title, xlabel=f"elements of the word (trained on {trained})", ylim=(0, 1.03))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("last token right")
    max(axes, key=lambda axis: len(axis.get_lines())).legend(frameon=False, fontsize=8)
    figures.titled(figure, results, QUESTION)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("tracking")
