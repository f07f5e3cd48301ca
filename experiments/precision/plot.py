"""The figure of `results.json`: errors against the length of the sequence, from 17 tokens on."""

from experiments import command
from experiments.figures import plt, saved

STYLES = {
    "scan": {"color": "#c0392b"},
    "associative": {"color": "#2980b9"},
    "pallas": {"color": "#16a085"},
    "plain scan": {"color": "#2c3e50", "linestyle": "--"},
    "transformers": {"color": "#8e44ad", "linestyle": "--"},
    "exact, rounded": {"color": "grey", "linestyle": ":"},
}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    panels = (
        ("float32", "y, worst channel, float32 inputs", lambda e: e["y"]["worst"]),
        (
            "float32",
            "gradients, worst channel, of magnitude",
            lambda e: max(e[x]["worst_of_magnitude"] for x in "wukv"),
        ),
        ("bfloat16", "y, rms where k ~ N(0, 1), bfloat16 inputs", lambda e: e["y"]["rms_of_mild"]),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.9), layout="constrained")
    for axis, (dtype, title, error) in zip(axes, panels, strict=True):
        for side, style in STYLES.items():
            rows = [row for row in results["rows"] if row["dtype"] == dtype and row["side"] == side and row["T"] > 1]
            errors = [error(row["errors"]) for row in rows]
            axis.plot([row["T"] for row in rows], errors, marker=".", label=side if rows else None, **style)
        axis.set(xlabel="tokens", xscale="log", yscale="log", title=title)
    axes[0].set_ylabel("relative error")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[2].legend(frameon=False, fontsize=8)
    stamp = results["stamp"]
    figure.suptitle(f"WKV-4 against float64; {', '.join(stamp['devices'])}, {stamp['date']}", fontsize=10)
    saved(figure, path)


if __name__ == "__main__":
    command.redraw("precision")
