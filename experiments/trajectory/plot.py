"""The figure of `results.json`: the loss of the released trainer and ours, and how far they are apart by step."""

import numpy as np

from experiments.figures import label_ends, panels, saved, titled
from experiments.results import redraw
from experiments.statistics import at_most

STYLES = {
    "float64": {"color": "#d55e00"},
    "RWKV-5.2, float64": {"color": "#882255"},
    "RWKV-6, float64": {"color": "#cc79a7"},
    "RWKV-7, float64": {"color": "#e69f00"},
    "float32": {"color": "#d55e00", "linestyle": "--"},
    "without L2Wrap": {"color": "#000000", "linestyle": "--"},
    "without learning-rate groups": {"color": "#0072b2", "linestyle": "--"},
}
FLOAT64 = [name for name in STYLES if "float64" in name]


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, [(left, right)] = panels(2, width=6.3, height=4)
    cells = results["cells"]
    for name, theirs in results["kept_losses"].items():
        steps = np.arange(1, len(theirs) + 1)
        left.plot(steps, theirs, color="#cccccc", linewidth=4)
        left.plot(steps, cells[name]["losses"], linewidth=0.8, label=_told(name), **STYLES[name])
    for name, cell in cells.items():
        for key, label in {"from kept": _told(name), "from clone": "RWKV-4, float64, the clone"}.items():
            if key in cell:
                away = np.maximum(cell[key]["loss_by_step"], 1e-17)
                style = STYLES.get(name, {"color": "#009e73", "linestyle": ":"})
                right.semilogy(steps, away, linewidth=0.9, label=label, **style)
    left.set(xlabel="step", ylabel="nats a token", title="loss; grey: released trainer, below ours")
    right.set(xlabel="step", ylabel="nats a token", title="difference of the losses from the released trainer's")
    for axis in (left, right):
        label_ends(axis)
    apart = {name: max(cells[name]["from kept"]["loss_by_step"]) for name in FLOAT64 if name in cells}
    largest = max(apart, key=apart.get)
    finding = f"In float64 losses differ by at most {at_most(apart[largest])} nats from the released trainer's"
    titled(figure, results, finding, f"{len(steps)} steps; the largest: {_told(largest)}")
    saved(figure, path)


def _told(name: str) -> str:
    return name if name.startswith("RWKV") else f"RWKV-4, {name}"


if __name__ == "__main__":
    redraw("trajectory")
