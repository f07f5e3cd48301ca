"""The figure of `results.json`: memory of a training step against the length of its sequence."""

from experiments.figures import plt, saved
from experiments.results import redraw

STYLES = {
    "whole": {"color": "#c0392b"},
    "segments": {"color": "#2980b9"},
    "segments, stopped": {"color": "#16a085", "linestyle": "--"},
}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for axis, name in zip(axes, ("resident", "temporary"), strict=True):
        for way, style in STYLES.items():
            rows = [row for row in results["rows"] if row["way"] == way]
            sizes = [row[f"{name}_bytes"] / 2**20 for row in rows]
            axis.plot([row["T"] for row in rows], sizes, marker=".", label=way, **style)
        axis.set(xlabel="tokens", xscale="log", yscale="log", title=f"{name}, MiB")
    axes[0].axhline(results["claims"]["below"] / 2**20, color="grey", linestyle=":", label="8 GiB")
    axes[0].legend(frameon=False, fontsize=8)
    stamp = results["stamp"]
    figure.suptitle(f"a training step; {', '.join(stamp['devices'])}, {stamp['date']}", fontsize=10)
    saved(figure, path)


if __name__ == "__main__":
    redraw("long")
