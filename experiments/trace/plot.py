"""The figure of `results.json`: effect of each place, and by layer where it is largest, for the three restorations."""

import numpy as np

from experiments.figures import label_ends, panels, saved, titled
from experiments.results import redraw

STYLES = {
    "residual": {"color": "#0072b2", "marker": "s"},
    "state": {"color": "#d55e00", "marker": "o"},
    "both": {"color": "#000000", "marker": "D"},
}
ROLES = ("last of subject", "after", "last")  # of the curves


def draw(results, path) -> None:
    """Write the figure as PNG: for each model, a map of both restored, and curves by layer of all three."""
    cells = {name: cell for name, cell in results["cells"].items() if "effect" in cell}
    figure, rows = panels(4, len(cells), width=3.7, height=3.4)
    for (name, cell), (first, *others) in zip(cells.items(), rows, strict=True):
        effects = {role: np.array(values)[:, 0] for role, values in cell["effect"]["both"].items() if all(values)}
        image = first.imshow(list(effects.values()), cmap="Purples", aspect="auto")
        first.grid(visible=False)
        figure.colorbar(image, ax=first).outline.set_visible(False)
        first.set_yticks(range(len(effects)), effects)
        first.set_title(f"{name}: both restored")
        for axis, role in zip(others, ROLES, strict=True):
            _curves(axis, cell, role)
        for axis in (first, *others):
            at = np.arange(0, image.get_size()[1], max(1, image.get_size()[1] // 8))
            axis.set_xticks(at, at + 1)
            axis.set_xlabel("layer")
        others[0].set_ylabel("probability given back")
    cell = next(iter(cells.values()))
    titled(figure, results, _finding(cell), f"causal trace of {cell['facts']} facts; bands: 95 %")
    saved(figure, path)


def _finding(cell) -> str:
    """Say where restoring both gives back most before the last token, beside a random place."""
    effect = {role: values for role, values in cell["effect"]["both"].items() if all(values) and role != "last"}
    if not effect:
        return "Probability that restoring a place gives back"
    role, values = max(effect.items(), key=lambda item: max(mean for mean, *_ in item[1]))
    layer, (mean, *_) = max(enumerate(values, 1), key=lambda item: item[1][0])
    where = f"'{role}', layer {layer}"
    return f"Restored at {where}: {mean:.2f} of probability; at a random place {cell['random_place']['both'][0]:.2f}"


def _curves(axis, cell, role):
    for kind, style in STYLES.items():
        values = cell["effect"][kind][role]
        if all(values):
            mean_L, low_L, high_L = np.array(values).T
            axis.plot(mean_L, label=kind if kind == "both" else f"{kind} alone", **style)
            axis.fill_between(np.arange(len(mean_L)), low_L, high_L, color=style["color"], alpha=0.2, linewidth=0)
    axis.axhline(cell["random_place"]["both"][0], color="#888888", linestyle=":", label="random place")
    axis.set_title(f"restored at '{role}'")
    label_ends(axis)


if __name__ == "__main__":
    redraw("trace")
