"""The figure of `results.json`: loss against context, what a carried state saves by distance, and the copy task."""

import numpy as np

from experiments.figures import COLOURS, label_ends, mark, panels, saved, style, titled
from experiments.results import redraw
from experiments.statistics import told

STYLES = {arm: style(arm) for arm in COLOURS}
STYLES["extended"] = STYLES["rwkv4"] | {"linestyle": "--", "color": "#8c3d00", "label": "extended", "marker": "*"}
STYLES["control"] = STYLES["rwkv4"] | {"linestyle": "-.", "color": "#f0a070", "label": "control", "marker": "."}
COPIES = {
    "copy": "rwkv4",
    "copy, extended": "extended",
    "copy, control": "control",
    **{f"copy, {name}, seed 0": name for name in ("rwkv5", "rwkv6", "rwkv7")},
}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    cells, T = results["cells"], results["study"]["base"]["seq_len"]
    figure, [(left, middle, right)] = panels(3, width=4.3)
    for arm in [arm for arm in STYLES if f"{arm}, seed 0" in cells]:
        cell, its = cells[f"{arm}, seed 0"], STYLES[arm]
        mean = lambda bits_D, n_D=cell["targets"]: np.average(bits_D, weights=n_D)
        contexts, reset = list(map(int, cell["after"])), mean(cell["reset"])
        left.plot(contexts, list(map(mean, cell["after"].values())), **its)
        left.plot([contexts[0], T], [reset, reset], ":", color=its["color"], linewidth=1)
        middle.plot(np.mean(cell["gain_by_distance"], axis=1), **its)
    mark(left, T, f"T = {T}")
    left.set(xscale="log", xlabel="bytes of context", ylabel="bits per byte")
    left.margins(y=0.12)  # room for the text at the foot
    left.set_title("loss of the same targets; dotted: reset each T")
    middle.set_xticks(range(3), ["T to 4 T", "4 T to 16 T", "16 T to 64 T"])
    middle.set(
        xlabel="distance from the text's beginning", ylabel="bits per byte", ylim=(min(0, middle.get_ylim()[0]), None)
    )
    middle.set_title("saved by a carried state against a reset each T")
    middle.set_xlim(-0.3, 2.3)
    window = cells["copy"]["window"]
    for name, arm in ((name, arm) for name, arm in COPIES.items() if name in cells):
        right.plot(list(map(int, cells[name]["share"])), list(cells[name]["share"].values()), **STYLES[arm])
    mark(right, window, "training window")
    right.set(xscale="log", xlabel="lag, symbols", ylabel="symbols right, share", ylim=(-0.02, 1.02))
    right.set_title("copy task, seed 0")
    for axis in (left, middle, right):
        label_ends(axis)
    longest = max(map(int, cells["rwkv4, seed 0"]["after"]))
    change = told(*results["change_beyond_a_window"]["rwkv4"], 4)
    finding = f"From {T} to {longest:,} bytes of context the loss of rwkv4 changes by {change} bits per byte"
    titled(figure, results, finding)
    saved(figure, path)


if __name__ == "__main__":
    redraw("context")
