"""The figure of `results.json`: errors against the length of the sequence, from 17 tokens on."""

from experiments.figures import label_ends, panels, saved, titled
from experiments.results import redraw

VECTORS = {
    "scan": {"color": "#d55e00", "marker": "o"},
    "associative": {"color": "#0072b2", "marker": "s"},
    "pallas": {"color": "#009e73", "marker": "^"},
    "plain scan": {"color": "#000000", "marker": "D", "linestyle": "--"},
    "transformers": {"color": "#cc79a7", "marker": "v", "linestyle": "--"},
    "exact, rounded": {"color": "#888888", "marker": ".", "linestyle": ":"},
}
MATRICES = {"WKV-5": ("#882255", "v"), "WKV-6": ("#cc79a7", "^"), "WKV-7": ("#e69f00", "D")}
LINES = {"scan": "-", "chunked": "--"}

WORST = ("float32", "y, worst channel, float32", lambda row: row["errors"]["y"]["worst"])
GRADIENTS = (
    "float32",
    "gradients, of magnitude",
    lambda row: max(x["worst_of_magnitude"] for name, x in row["errors"].items() if name not in ("y", "final")),
)
MILD = ("bfloat16", "y, rms at k ~ N(0, 1), bfloat16", lambda row: row["errors"]["y"]["rms_of_mild"])
SHARE = ("float32", "largest error, share of its bound", lambda row: max(row["share_of_bound"].values()))


def draw(results, path) -> None:
    """Write the figure as PNG: WKV-4 above, the operators of matrices below."""
    above = {("WKV-4", side): (side, style) for side, style in VECTORS.items()}
    below = {
        (operator, side): (f"{operator} {side}", {"color": color, "marker": marker, "linestyle": line})
        for operator, (color, marker) in MATRICES.items()
        for side, line in LINES.items()
    }
    figure, axes = panels(3, 2, width=4.4, height=3.7)
    for row_of_axes, name, lines, last in zip(
        axes, ("WKV-4", "WKV-5, 6, 7"), (above, below), (MILD, SHARE), strict=True
    ):
        for axis, (dtype, title, error) in zip(row_of_axes, (WORST, GRADIENTS, last), strict=True):
            for (operator, side), (label, style) in lines.items():
                rows = [row for row in results["rows"] if (row["operator"], row["side"]) == (operator, side)]
                shown = [row for row in rows if row["dtype"] == dtype and row["T"] > 1]
                axis.plot([row["T"] for row in shown], list(map(error, shown)), label=label, **style)
            axis.set(xlabel="T, tokens", xscale="log", yscale="log", title=f"{name}: {title}", ylabel="relative error")
    axes[1, 2].set(ylim=(1e-3, 1), ylabel="share")
    for axis in axes.flat:
        label_ends(axis)
    titled(figure, results, _finding(results["rows"]), "WKV against float64")
    saved(figure, path)


def _finding(rows) -> str:
    dtype, _, error = WORST
    rows = [row for row in rows if (row["operator"], row["dtype"]) == ("WKV-4", dtype)]
    longest = max(row["T"] for row in rows)
    last = {row["side"]: error(row) for row in rows if row["T"] == longest}
    told = ", ".join(f"{side} {x:.0e}" for side, x in last.items())
    return f"WKV-4, relative error after {longest:,} tokens in {dtype}: {told}"


if __name__ == "__main__":
    redraw("precision")
