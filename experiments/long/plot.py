"""The figure of `results.json`: memory of a training step against the length of its sequence."""

from experiments.figures import label_ends, panels, saved, titled, within_decades
from experiments.results import redraw

STYLES = {
    "whole": {"color": "#d55e00", "marker": "o"},
    "segments": {"color": "#0072b2", "marker": "s"},
    "segments, stopped": {"color": "#009e73", "marker": "^", "linestyle": "--"},
}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, [axes] = panels(2, width=5.5, height=3.8, sharex=True)
    for axis, name in zip(axes, ("resident", "temporary"), strict=True):
        for way, style in STYLES.items():
            rows = [row for row in results["rows"] if row["way"] == way]
            sizes = [row[f"{name}_bytes"] / 2**20 for row in rows]
            axis.plot([row["T"] for row in rows], sizes, label=way, **style)
        axis.set(xlabel="T, tokens of the sequence", ylabel="MiB", title=f"{name} memory")
        within_decades(axis.yaxis, "{x:,.0f}")
        axis.set_xscale("log")
    below = results["claims"]["below"] / 2**20
    axes[0].axhline(below, color="#888888", linestyle=":", label=f"{below / 1024:.0f} GiB")
    for axis in axes:
        label_ends(axis)
    longest = max(row["T"] for row in results["rows"])
    last = {row["way"]: row["temporary_bytes"] / 2**20 for row in results["rows"] if row["T"] == longest}
    told = "; ".join(f"{way} {MiB:,.0f} MiB" for way, MiB in last.items())
    titled(figure, results, f"Temporary memory of a step of {longest:,} tokens: {told}", "a training step")
    saved(figure, path)


if __name__ == "__main__":
    redraw("long")
