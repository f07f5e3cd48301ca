"""The figure of `results.json`: decays of every layer, sorted, before and after training, and what changed."""

from pathlib import Path

import numpy as np

from experiments.figures import plt, saved


def draw(results, path) -> None:
    """Write the figure as PNG: a row of panels for each start, and for each model that was added."""
    cells = results["cells"]
    figure, rows = plt.subplots(len(cells), 2, figsize=(9, 3.2 * len(cells)), layout="constrained", squeeze=False)
    for (name, cell), (left, right) in zip(cells.items(), rows, strict=True):
        colors = plt.cm.viridis(np.linspace(0, 0.9, len(cell["after"])))
        for layer, (before, after, color) in enumerate(zip(cell["before"], cell["after"], colors, strict=True), 1):
            share = np.linspace(0, 1, len(after["decays"]))
            left.plot(share, before["decays"], color=color, linestyle="--", linewidth=0.8)
            left.plot(share, after["decays"], color=color, label=f"layer {layer}")
            right.plot(share, np.subtract(after["decays"], before["decays"]), color=color)
        title = name.replace(", seed 0", " start") if ", seed 0" in name else Path(name).name
        left.set(title=f"{title}: before (dashed) and after", ylabel="decay a token", ylim=(-0.02, 1.02))
        right.set(title="after - before", ylabel="difference of sorted decays")
        right.axhline(0, color="grey", linewidth=0.6)
    for axis in rows[-1]:
        axis.set_xlabel("share of channels")
    rows[0, 0].legend(frameon=False, fontsize=7, ncols=1 + len(cells["released, seed 0"]["after"]) // 8)
    base, stamp = results["study"]["base"], results["stamp"]
    size = f"{base['model.num_layers']} x {base['model.dim']}, {base['steps']} steps"
    figure.suptitle(f"{size}; {stamp['devices'][0]}, {stamp['date']}", fontsize=10)
    saved(figure, path)
