"""The figure of `results.json`: loss against context, what a carried state saves by distance, and the copy task."""

import numpy as np

from experiments.figures import COLOURS, panels, saved, titled
from experiments.results import redraw

ARMS = COLOURS | {"extended": "#16a085", "control": "#95a5a6"}
COPIES = {
    "copy": "rwkv4",
    "copy, extended": "extended",
    "copy, control": "control",
    **{f"copy, {name}, seed 0": name for name in ("rwkv5", "rwkv6", "rwkv7")},
}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    cells, T = results["cells"], results["study"]["base"]["seq_len"]
    figure, [(left, middle, right)] = panels(3)
    for arm in [arm for arm in ARMS if f"{arm}, seed 0" in cells]:
        cell, color = cells[f"{arm}, seed 0"], ARMS[arm]
        mean = lambda bits_D, n_D=cell["targets"]: np.average(bits_D, weights=n_D)
        left.plot(list(map(int, cell["after"])), list(map(mean, cell["after"].values())), ".-", color=color, label=arm)
        left.axhline(mean(cell["reset"]), color=color, linestyle=":", linewidth=0.8)
        middle.plot(np.mean(cell["gain_by_distance"], axis=1), "o-", color=color, label=arm)
    left.axvline(T, color="grey", linewidth=0.6)
    left.set(
        xscale="log", xlabel="bytes of context", ylabel="bits a byte", title="same targets (dotted: reset each T)"
    )
    left.legend(frameon=False, fontsize=8)
    middle.set_xticks(range(3), ["T to 4 T", "4 T to 16 T", "16 T to 64 T"])
    middle.set(xlabel="distance from the text's beginning", ylabel="bits a byte", title="saved against a reset each T")
    middle.axhline(0, color="grey", linewidth=0.6)
    window = cells["copy"]["window"]
    for name, arm in ((name, arm) for name, arm in COPIES.items() if name in cells):
        label = f"{arm}, windows of {window}" if name == "copy" else arm
        lags, share = list(map(int, cells[name]["share"])), list(cells[name]["share"].values())
        right.plot(lags, share, ".-", color=ARMS[arm], label=label)
    right.axvline(window, color="grey", linewidth=0.6)
    right.set(xscale="log", xlabel="lag", ylabel="share right", title="copy task", ylim=(-0.02, 1.02))
    right.legend(frameon=False, fontsize=8)
    titled(figure, results)
    saved(figure, path)


if __name__ == "__main__":
    redraw("context")
