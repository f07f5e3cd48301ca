"""The figure of results.json: sorted decays of every layer before and after training."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw the sorted decays of every layer before and after training, a row of panels for each model."""
    cells = results["cells"]
    figure, rows = figures.panels(2, len(cells), width=4.5, height=3.2)
    for (name, cell), (left, right) in zip(cells.items(), rows, strict=True):
        colors = figures.plt.cm.viridis(np.linspace(0, 0.9, len(cell["after"])))
        for layer, (before, after, color) in enumerate(zip(cell["before"], cell["after"], colors, strict=True), 1):
            share = np.linspace(0, 1, len(after["decays"]))
            left.plot(share, before["decays"], color=color, linestyle="--", linewidth=0.8)
            left.plot(share, after["decays"], color=color, label=f"layer {layer}")
            right.plot(share, np.subtract(after["decays"], before["decays"]), color=color)
        title = name.replace(", seed 0", " start") if ", seed 0" in name else Path(name).name
        left.set(title=f"{title}: before (dashed) and after", xlabel="share of channels", ylabel="decay a token")
        right.set(title="after - before", xlabel="share of channels", ylabel="difference of sorted decays")
        right.axhline(0, color="grey", linewidth=0.6)
    rows[0, 0].legend(frameon=False, fontsize=7, ncols=1 + len(cells["released, seed 0"]["after"]) // 8)
    figures.titled(figure, results)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("decays")
