"""The figure of `results.json`: effect of each place, and by layer where it is largest, for the three restorations."""

import numpy as np

from experiments.figures import plt, saved

COLORS = {"residual": "#2980b9", "state": "#c0392b", "both": "#2c3e50"}
ROLES = ("last of subject", "after", "last")  # of the curves


def draw(results, path) -> None:
    """Write the figure as PNG: for each model, a map of both restored, and curves by layer of all three."""
    cells = {name: cell for name, cell in results["cells"].items() if "effect" in cell}
    height = 3.2 * len(cells)
    figure, rows = plt.subplots(len(cells), 4, figsize=(14, height), layout="constrained", squeeze=False)
    for (name, cell), axes in zip(cells.items(), rows, strict=True):
        _map(figure, axes[0], name, cell)
        for axis, role in zip(axes[1:], ROLES, strict=True):
            _curves(axis, cell, role)
        axes[1].set_ylabel("probability given back")
        axes[1].legend(frameon=False, fontsize=8)
    stamp = results["stamp"]
    figure.suptitle(f"causal trace; {stamp['devices'][0]}, {stamp['date']}", fontsize=10)
    saved(figure, path)


def _map(figure, axis, name, cell):
    effects = {role: values for role, values in cell["effect"]["both"].items() if all(values)}
    image = axis.imshow([[mean for mean, *_ in values] for values in effects.values()], cmap="Purples", aspect="auto")
    axis.set_yticks(range(len(effects)), effects, fontsize=8)
    axis.set_xticks(*_layers(len(next(iter(effects.values())))))
    axis.set(xlabel="layer", title=f"{name}: both restored, {cell['facts']} facts")
    figure.colorbar(image, ax=axis)


def _curves(axis, cell, role):
    for kind, color in COLORS.items():
        values = cell["effect"][kind][role]
        if not all(values):
            continue
        mean_L, low_L, high_L = np.array(values).T
        axis.plot(mean_L, color=color, marker=".", label=kind if kind == "both" else f"{kind} alone")
        axis.fill_between(np.arange(len(mean_L)), low_L, high_L, color=color, alpha=0.2, linewidth=0)
        axis.set_xticks(*_layers(len(mean_L)))
    axis.axhline(cell["random_place"]["both"][0], color="grey", linestyle=":", label="both, random place")
    axis.set(xlabel="layer", title=role)


def _layers(num_layers):
    at = np.arange(0, num_layers, max(1, num_layers // 8))
    return at, at + 1
