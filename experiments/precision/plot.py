"""The figure of `results.json`: errors against the length of the sequence, from 17 tokens on."""

from experiments.figures import plt, saved
from experiments.results import redraw

VECTORS = {
    "scan": {"color": "#c0392b"},
    "associative": {"color": "#2980b9"},
    "pallas": {"color": "#16a085"},
    "plain scan": {"color": "#2c3e50", "linestyle": "--"},
    "transformers": {"color": "#8e44ad", "linestyle": "--"},
    "exact, rounded": {"color": "grey", "linestyle": ":"},
}
MATRICES = {"WKV-5": "#c0392b", "WKV-6": "#2980b9", "WKV-7": "#16a085"}
LINES = {"scan": "-", "chunked": "--"}

WORST = ("float32", "y, worst channel, float32 inputs", lambda row: row["errors"]["y"]["worst"])
GRADIENTS = (
    "float32",
    "gradients, worst channel, of magnitude",
    lambda row: max(x["worst_of_magnitude"] for name, x in row["errors"].items() if name not in ("y", "final")),
)
MILD = ("bfloat16", "y, rms where k ~ N(0, 1), bfloat16 inputs", lambda row: row["errors"]["y"]["rms_of_mild"])
SHARE = ("float32", "largest error of all, of its bound", lambda row: max(row["share_of_bound"].values()))


def draw(results, path) -> None:
    """Write the figure as PNG: WKV-4 above, the operators of matrices below."""
    above = {("WKV-4", side): (side, style) for side, style in VECTORS.items()}
    below = {
        (operator, side): (f"{operator} {side}", {"color": color, "linestyle": line})
        for operator, color in MATRICES.items()
        for side, line in LINES.items()
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    for row_of_axes, lines, last in zip(axes, (above, below), (MILD, SHARE), strict=True):
        for axis, panel in zip(row_of_axes, (WORST, GRADIENTS, last), strict=True):
            _panel(axis, results["rows"], lines, *panel)
        row_of_axes[0].set_ylabel("relative error")
        row_of_axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[0, 2].legend(frameon=False, fontsize=8)
    axes[1, 2].set_ylim(1e-3, 1)
    axes[0, 0].annotate("WKV-4", (-0.22, 1.05), xycoords="axes fraction", weight="bold")
    axes[1, 0].annotate("WKV-5, 6, 7", (-0.22, 1.05), xycoords="axes fraction", weight="bold")
    stamp = results["stamp"]
    figure.suptitle(f"WKV against float64; {', '.join(stamp['devices'])}, {stamp['date']}", fontsize=10)
    saved(figure, path)


def _panel(axis, rows, lines, dtype, title, error):
    for (operator, side), (label, style) in lines.items():
        shown = [r for r in rows if (r["operator"], r["side"], r["dtype"]) == (operator, side, dtype) and r["T"] > 1]
        errors = [error(row) for row in shown]
        axis.plot([row["T"] for row in shown], errors, marker=".", label=label if shown else None, **style)
    axis.set(xlabel="tokens", xscale="log", yscale="log", title=title)


if __name__ == "__main__":
    redraw("precision")
