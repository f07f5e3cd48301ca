"""Figures without a display, and the default figure of a study."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

__all__ = ["COLOURS", "draw", "panels", "plt", "saved", "titled"]

# One colour per arm, the same in every figure.
COLOURS = {
    "rwkv4": "#c0392b",
    "rwkv5": "#8d6e63",
    "rwkv6": "#f1c40f",
    "rwkv7": "#e67e22",
    "transformer": "#2c3e50",
    "transformer+shift": "#2980b9",
    "transformer, no cache": "#7f8c8d",
    "lstm": "#27ae60",
    "hybrid": "#8e44ad",
}


def panels(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.8, **shared):
    """Return a figure and its axes [rows, columns]; `width` and `height` are inches per panel."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)


def titled(figure, results: dict, text: str = "") -> None:
    """Title a figure: `text`, by default the size and steps of the study's base, then the hardware and the date."""
    if not text:
        base = results["study"]["base"]
        text = f"{base['model.num_layers']} x {base['model.dim']}, {base['steps']} steps"
    stamp = results["stamp"]
    figure.suptitle(f"{text}; {', '.join(stamp['devices'])}, {stamp['date']}", fontsize=10)


def saved(figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG and close it."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw(results: dict, path: Path) -> None:
    """Draw the figure of a study: training loss of its arms, and their differences with each pair of seeds.

    The axis of the differences is linear near zero and logarithmic beyond, because effects differ a hundredfold.
    """
    study, stamp = results["study"], results["stamp"]
    rows = {arm: row for arm, row in results["table"].items() if row.get("difference") is not None}
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["difference"]))
    size = (11, max(3.6, 1.2 + 0.32 * len(rows)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(1, 1.3))
    for i, arm in enumerate(results["table"]):
        its = [cell for name, cell in results["cells"].items() if name.startswith(f"{arm}, seed ")]
        runs = [cell for cell in its if "tokens" in cell]
        for n, curve in enumerate(run["curve"] for run in runs if run["tokens"] == runs[-1]["tokens"]):
            style = {"color": COLOURS.get(arm, plt.cm.tab20(i % 20)), "linewidth": 0.8, "label": None if n else arm}
            left.plot(curve["tokens"], curve["loss_nats"], **style)
    left.set(xlabel="tokens", ylabel="training loss, nats")
    left.xaxis.set_major_formatter(EngFormatter())
    left.legend(frameon=False, fontsize=7)
    for y, row in enumerate(rows.values()):
        colour = "#2c3e50" if row.get("resolved") else "#95a5a6"
        if row["low"] is not None:
            right.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.5)
        right.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", color=colour, markersize=8)
        right.plot(row["difference"], y, "o", color=colour, markersize=5)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_xscale("symlog", linthresh=0.01)
    right.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    right.set_yticks(range(len(rows)), rows)
    right.set_ylim(-0.7, len(rows) - 0.3)
    number = study["measure"][0].replace("_", " ")
    right.set_xlabel(f"{number} minus {study['against']}'s\n(right: worse; dark: resolved after Holm's correction)")
    figure.suptitle(f"{', '.join(stamp['devices'])}, {stamp['date']}", fontsize=9)
    saved(figure, path)
