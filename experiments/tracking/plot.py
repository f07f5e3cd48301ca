"""The figure of results.json: accuracy of the last token against the length of a word."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw

STYLES = {arm: figures.style(arm) for arm in figures.COLOURS}
STYLES["rwkv7 (removal 2)"] = STYLES["rwkv7"] | {"color": "#8a5a00", "linestyle": "--", "marker": "d"}


def draw(results: dict, path: Path) -> None:
    """Draw a panel for each group and depth: the mean of a model's seeds, and a band from the least to the most."""
    panels = {}
    for name, cell in results["cells"].items():
        panel, model = name.rsplit(", seed ", 1)[0].split(", ")
        panels.setdefault(panel, {}).setdefault(model, []).append(cell)
    trained = results["study"]["base"]["seq_len"]
    columns = min(2, len(panels))
    figure, axes = figures.panels(columns, -(-len(panels) // columns), width=5.6, height=3.5)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (panel, models) in zip(axes.flat, panels.items(), strict=False):
        group, _, depth = panel.partition(" x ")
        for model, cells in models.items():
            right_ST = np.array([cell["right"] for cell in cells])
            length_T, its = np.arange(1, right_ST.shape[1] + 1), STYLES[model]
            axis.fill_between(length_T, right_ST.min(0), right_ST.max(0), color=its["color"], alpha=0.1, linewidth=0)
            marked = np.unique(np.geomspace(1, len(length_T), 7).astype(int)) - 1
            axis.plot(length_T, right_ST.mean(0), **its | {"label": model, "markevery": marked.tolist()})
        axis.axvline(trained, color="#888888", linewidth=0.8)
        axis.axhline(results["chance"][group], color="#888888", linewidth=0.8, linestyle=":", label="chance")
        title, xlabel = f"{group}, {depth} layer{'s' * (depth != '1')}", f"elements of the word (trained on {trained})"
        axis.set(title=title, xlabel=xlabel, ylabel="last product right, share", ylim=(0, 1.03))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        figures.label_ends(axis)
    figures.titled(figure, results, _finding(panels, trained), "mean of the seeds; bands: all seeds")
    figures.saved(figure, path)


def _finding(panels: dict, trained: int) -> str:
    """Return the accuracy of each model at the length of training, of the panel with the most models."""
    panel, models = max(panels.items(), key=lambda item: len(item[1]))
    share = {model: np.mean([cell["right"][trained - 1] for cell in cells]) for model, cells in models.items()}
    told = ", ".join(f"{model} {right:.2f}" for model, right in share.items())
    return f"{panel.partition(' x ')[0]}, {trained} elements: {told}"


if __name__ == "__main__":
    redraw("tracking")
