"""The figure of results.json: what each method gains on the new text and loses on the old."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Draw what each arm gains on the new text and loses on the old, against its trained parameters."""
    figure, [[axis]] = figures.panels(1, width=8, height=4.4)
    cells = {name.removesuffix(", seed 0"): cell for name, cell in results["cells"].items()}
    for text, rows, colour, marker in (
        ("new", results["table"], "#d55e00", "o"),
        ("old", results["old"], "#0072b2", "s"),
    ):
        arms = [arm for arm in rows if arm != "none"]
        trained = [cells[arm]["trained"] for arm in arms]
        mean, low, high = np.array([[rows[arm][x] for x in ("difference", "low", "high")] for arm in arms], float).T
        label = f"{text} text: {cells['none']['texts'][text]}"
        bars = {"color": colour, "capsize": 3, "elinewidth": 1.2, "label": label}
        axis.errorbar(trained, mean, [mean - low, high - mean], fmt=marker, **bars)
        for arm, x, y in zip(arms, trained, mean, strict=True) if text == "new" else ():
            where = {"ha": "left", "xytext": (7, 4)} if arm == "full" else {"ha": "right", "xytext": (-7, 4)}
            axis.annotate(arm, (x, y), textcoords="offset points", fontsize=figures.SMALLEST, **where)
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set(xscale="log", xlabel="trained parameters", ylabel="bits per byte, change by fine-tuning")
    axis.margins(x=0.15, y=0.15)
    axis.legend(loc="upper left")
    new, old = (rows["full"]["difference"] for rows in (results["table"], results["old"]))
    figures.titled(
        figure, results, f"Full fine-tuning: {new:+.2f} bits per byte on the new text, {old:+.2f} on the old"
    )
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("finetune")
