"""The figure of results.json: held-out loss of the four starts, and their differences."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw the held-out loss of the four starts, and the differences between them at shares of the run."""
    base, colours = results["study"]["base"], ("#c0392b", "#e59866", "#2c3e50", "#7fb3d5")
    figure, [(left, right)] = figures.panels(2, width=5)
    for arm, colour in zip(results["study"]["arms"], colours, strict=True):
        runs = [run for name, run in results["cells"].items() if name.startswith(f"{arm}, seed ")]
        for i, run in enumerate(runs):
            label = f"{arm} (lr {run['lr']:g})" if i == 0 else None
            tokens = base["seq_len"] * base["batch_size"] * np.array(run["curve"]["evaluated_steps"])
            left.plot(tokens, run["curve"]["valid_loss_nats"], color=colour, linewidth=0.9, label=label)
    left.set(xscale="log", xlabel="tokens", ylabel="held-out nats a token")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    for i, name in enumerate(results["differences"]["1"]):
        rows = np.array([at_share[name] for at_share in results["differences"].values()])
        mean, low, high = rows.T
        x = np.arange(len(rows)) + 0.2 * (i - 1)
        right.errorbar(x, mean, [mean - low, high - mean], fmt="o", color=colours[i], markersize=5, label=name)
    right.axhline(0, color="grey", linewidth=0.6)
    right.set_xticks(range(len(results["differences"])), [f"{float(x):.0%}" for x in results["differences"]])
    right.set(xlabel="share of the run", ylabel="nats a token (below 0: better)")
    right.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figures.titled(figure, results)
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("small_init")
