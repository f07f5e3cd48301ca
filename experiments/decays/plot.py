"""The figure of results.json: sorted decays of every layer before and after training."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw the sorted decays of every layer before and after training, a row of panels for each model."""
    cells, moved = results["cells"], []
    figure, rows = figures.panels(2, len(cells), width=5.5, height=3.2)
    for (name, cell), (left, right) in zip(cells.items(), rows, strict=True):
        layers = len(cell["after"])
        colors = figures.plt.cm.viridis(np.linspace(0, 0.85, layers))
        named = np.unique(np.linspace(1, layers, min(layers, 5)).astype(int))
        for layer, (before, after, color) in enumerate(zip(cell["before"], cell["after"], colors, strict=True), 1):
            share = np.linspace(0, 1, len(after["decays"]))
            change = np.subtract(after["decays"], before["decays"])
            left.plot(share, before["decays"], color=color, linestyle="--", linewidth=0.8)
            left.plot(share, after["decays"], color=color)
            right.plot(share, change, color=color, label=f"layer {layer}" if layer in named else None)
            moved.append((name, np.abs(change).max()))
        title = name.replace(", seed 0", " start") if ", seed 0" in name else Path(name).name
        left.set(title=f"{title}: before (dashed) and after training", ylabel="decay a token")
        right.set(title=f"{title}: after minus before", ylabel="difference of sorted decays")
        right.axhline(0, color="#888888", linewidth=0.6)
        figures.label_ends(right)
        for axis in (left, right):
            axis.set_xlabel("share of the layer's channels")
    largest = {name: max(change for other, change in moved if other == name) for name in cells}
    told = ", ".join(f"{name.removesuffix(', seed 0')} {x:.2f}" for name, x in largest.items())
    figures.titled(figure, results, f"Largest change of a sorted decay by training: {told}")
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("decays")
