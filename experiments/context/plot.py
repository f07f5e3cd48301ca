"""The figure of `results.json`: loss against context, what a carried state saves by distance, and the copy task."""

import numpy as np

from experiments.figures import COLOURS, plt, saved

ARMS = COLOURS | {"extended": "#e67e22", "control": "#f1c40f"}
COPIES = {"copy": "rwkv4", "copy, extended": "extended", "copy, control": "control"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    cells, base = results["cells"], results["study"]["base"]
    T = base["seq_len"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, color in ARMS.items():
        cell = cells.get(f"{name}, seed 0")
        if cell is None:
            continue
        mean = lambda bits_D, n_D=cell["targets"]: np.average(bits_D, weights=n_D)
        left.plot(
            [int(c) for c in cell["after"]], list(map(mean, cell["after"].values())), ".-", color=color, label=name
        )
        left.axhline(mean(cell["reset"]), color=color, linestyle=":", linewidth=0.8)
        gains = np.mean(cell["gain_by_distance"], axis=1)
        middle.plot(range(len(gains)), gains, "o-", color=color, label=name)
    left.axvline(T, color="grey", linewidth=0.6)
    left.set(
        xscale="log", xlabel="bytes of context", ylabel="bits a byte", title="the same targets (dotted: reset each T)"
    )
    left.legend(frameon=False, fontsize=8)
    middle.set_xticks(range(3), ["T to 4 T", "4 T to 16 T", "16 T to 64 T"])
    middle.set(xlabel="distance from the text's beginning", ylabel="bits a byte", title="saved against a reset each T")
    middle.axhline(0, color="grey", linewidth=0.6)
    for name, of in COPIES.items():
        share = cells[name]["share"]
        label = {"rwkv4": f"windows of {cells['copy']['window']}"}.get(of, of)
        right.plot([int(lag) for lag in share], list(share.values()), ".-", color=ARMS[of], label=label)
    right.axvline(cells["copy"]["window"], color="grey", linewidth=0.6)
    right.set(xscale="log", xlabel="lag", ylabel="share right", title="copy task", ylim=(-0.02, 1.02))
    right.legend(frameon=False, fontsize=8)
    stamp = results["stamp"]
    size = f"{base['model.num_layers']} x {base['model.dim']}, T {T}, {base['steps']} steps"
    figure.suptitle(f"{size}; {stamp['devices'][0]}, {stamp['date']}", fontsize=10)
    saved(figure, path)
