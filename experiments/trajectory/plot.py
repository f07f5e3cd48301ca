"""The figure of `results.json`: the loss of the released trainer and ours, and how far they are apart by step."""

import numpy as np

from experiments import command
from experiments.figures import plt, saved

COLOURS = {"float64": "#c0392b", "float32": "#e67e22"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    theirs = np.array(results["kept_losses"])
    steps = np.arange(1, len(theirs) + 1)
    left.plot(steps, theirs, color="#bbbbbb", linewidth=4, label="released trainer")
    left.plot(steps, results["cells"]["float64"]["losses"], color="#c0392b", linewidth=0.8, label="rwkv_jax, float64")
    for name, cell in results["cells"].items():
        differences = {"from kept": name, "from clone": f"float64, from {name}"}
        for key, label in differences.items():
            if key in cell:
                away = np.maximum(cell[key]["loss_by_step"], 1e-17)
                style = {"linestyle": "--" if name.startswith("without") else ":" if key == "from clone" else "-"}
                right.semilogy(steps, away, linewidth=0.9, color=COLOURS.get(name), label=label, **style)
    left.set(xlabel="step", ylabel="nats a token", title="loss: one curve on the other")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="step", ylabel="nats a token", title="difference of the losses")
    right.legend(frameon=False, fontsize=7)
    saved(figure, path)


if __name__ == "__main__":
    command.redraw("trajectory")
