"""The figure of results.json: held-out loss of the four starts, and their differences."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw
from experiments.statistics import told

STYLES = (  # of the arms: small starts are warm, normal ones cool; dashed: without LN0
    {"color": "#d55e00"},
    {"color": "#d55e00", "linestyle": "--"},
    {"color": "#0072b2"},
    {"color": "#0072b2", "linestyle": "--"},
)
EFFECTS = (("#000000", "o"), ("#009e73", "s"), ("#cc79a7", "^"))


def draw(results: dict, path: Path) -> None:
    """Draw the held-out loss of the four starts, and the differences between them at shares of the run."""
    base = results["study"]["base"]
    figure, [(left, right)] = figures.panels(2, width=5.8, height=4)
    for arm, style in zip(results["study"]["arms"], STYLES, strict=True):
        runs = [run for name, run in results["cells"].items() if name.startswith(f"{arm}, seed ")]
        tokens = base["seq_len"] * base["batch_size"] * np.array(runs[0]["curve"]["evaluated_steps"])
        loss_SN = np.array([run["curve"]["valid_loss_nats"] for run in runs])
        left.fill_between(tokens, loss_SN.min(0), loss_SN.max(0), color=style["color"], alpha=0.12, linewidth=0)
        left.plot(tokens, loss_SN.mean(0), label=arm, **style)
    left.set(
        xlabel="training tokens", ylabel="held-out loss, nats a token", title="mean of the seeds; bands: all seeds"
    )
    figures.within_decades(left.xaxis, "{x:,.0f}")
    figures.label_ends(left)
    for i, (name, (color, marker)) in enumerate(zip(results["differences"]["1"], EFFECTS, strict=True)):
        rows = np.array([at_share[name] for at_share in results["differences"].values()])
        mean, low, high = rows.T
        x = np.arange(len(rows)) + 0.2 * (i - 1)
        right.errorbar(x, mean, [mean - low, high - mean], fmt=marker, color=color, markersize=5, label=name)
    right.axhline(0, color="#888888", linewidth=0.6)
    right.set_xticks(range(len(results["differences"])), [f"{float(x):.0%}" for x in results["differences"]])
    right.set(xlabel="share of the run", ylabel="nats a token (below 0: better)")
    right.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1), handletextpad=0.2, columnspacing=1)
    effects = {"LN0": "LN0", "the small embedding": "small"}
    effects = {name: results["differences"]["1"][key] for name, key in effects.items()}
    effects = ", ".join(f"{name} {told(*effect, 2)}" for name, effect in effects.items())
    figures.titled(figure, results, f"Effect on the final loss, nats a token: {effects}")
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("small_init")
