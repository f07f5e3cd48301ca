"""The figure of `results.json`: the paper's numbers against model size, of all tasks and of LAMBADA."""

from experiments.figures import plt, saved
from experiments.results import redraw

COLOURS = {"RWKV-4": "C3", "Pythia": "C0", "GPT-Neo": "C2", "GPT-J": "C4", "GPT-NeoX": "C5"}
PANELS = {"mean": "mean accuracy of 13 tasks, %", "lambada_openai": "LAMBADA, accuracy, %"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for family, color in COLOURS.items():
            rows = [row for row in results["expected"] if row["family"] == family]
            values = [row["values"].get(name, row.get(name)) for row in rows]
            axis.plot([row["billions"] for row in rows], values, "o-", color=color, label=family)
        axis.set(xscale="log", xlabel="parameters, billions", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("arXiv:2305.13048v1, Tables 3 and 4, as published; not run here", fontsize=10)
    saved(figure, path)


if __name__ == "__main__":
    redraw("zero_shot")
