"""The figure of `results.json`: the loss of the released trainer and ours, and how far they are apart by step."""

import numpy as np

from experiments.figures import plt, saved
from experiments.results import redraw

COLOURS = {
    "float64": "#c0392b",
    "RWKV-5.2, float64": "#8e44ad",
    "RWKV-6, float64": "#2980b9",
    "RWKV-7, float64": "#27ae60",
    "float32": "#e67e22",
}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    for name, theirs in results["kept_losses"].items():
        steps = np.arange(1, len(theirs) + 1)
        label = None if name != "float64" else "released trainer"
        left.plot(steps, theirs, color="#cccccc", linewidth=4, label=label)
        label = "RWKV-4, float64" if name == "float64" else name
        left.plot(steps, results["cells"][name]["losses"], color=COLOURS[name], linewidth=0.8, label=label)
    for name, cell in results["cells"].items():
        differences = {"from kept": name, "from clone": f"float64, from {name}"}
        for key, label in differences.items():
            if key in cell:
                away = np.maximum(cell[key]["loss_by_step"], 1e-17)
                style = {"linestyle": "--" if name.startswith("without") else ":" if key == "from clone" else "-"}
                right.semilogy(steps, away, linewidth=0.9, color=COLOURS.get(name), label=label, **style)
    left.set(xlabel="step", ylabel="nats a token", title="loss: one curve on the other")
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="step", ylabel="nats a token", title="difference of the losses")
    right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    saved(figure, path)


if __name__ == "__main__":
    redraw("trajectory")
