"""The figure of `results.json`: effect of each place, and by layer where it is largest, for the three restorations."""

import numpy as np

from experiments.figures import panels, saved, titled
from experiments.results import redraw

COLORS = {"residual": "#2980b9", "state": "#c0392b", "both": "#2c3e50"}
ROLES = ("last of subject", "after", "last")  # of the curves


def draw(results, path) -> None:
    """Write the figure as PNG: for each model, a map of both restored, and curves by layer of all three."""
    cells = {name: cell for name, cell in results["cells"].items() if "effect" in cell}
    figure, rows = panels(4, len(cells), width=3.5, height=3.2)
    for (name, cell), (first, *others) in zip(cells.items(), rows, strict=True):
        effects = {role: np.array(values)[:, 0] for role, values in cell["effect"]["both"].items() if all(values)}
        image = first.imshow(list(effects.values()), cmap="Purples", aspect="auto")
        figure.colorbar(image, ax=first)
        first.set_yticks(range(len(effects)), effects, fontsize=8)
        first.set_title(f"{name}: both restored, {cell['facts']} facts")
        for axis, role in zip(others, ROLES, strict=True):
            _curves(axis, cell, role)
        for axis in (first, *others):
            at = np.arange(0, image.get_size()[1], max(1, image.get_size()[1] // 8))
            axis.set_xticks(at, at + 1)
            axis.set_xlabel("layer")
        others[0].set_ylabel("probability given back")
        others[0].legend(frameon=False, fontsize=8)
    titled(figure, results, "causal trace")
    saved(figure, path)


def _curves(axis, cell, role):
    for kind, color in COLORS.items():
        values = cell["effect"][kind][role]
        if all(values):
            mean_L, low_L, high_L = np.array(values).T
            axis.plot(mean_L, color=color, marker=".", label=kind if kind == "both" else f"{kind} alone")
            axis.fill_between(np.arange(len(mean_L)), low_L, high_L, color=color, alpha=0.2, linewidth=0)
    axis.axhline(cell["random_place"]["both"][0], color="grey", linestyle=":", label="both, random place")
    axis.set_title(role)


if __name__ == "__main__":
    redraw("trace")
