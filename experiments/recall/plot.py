"""The figure of `results.json`: accuracy at the questions against examples, a panel for each case.

python -m experiments.recall.plot [results.json [figure.png]]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"rwkv4": "#c0392b", "transformer": "#2c3e50", "transformer+shift": "#2980b9", "hybrid": "#27ae60"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    chances = results["chance"]
    figure, axes = plt.subplots(1, len(chances), figsize=(4 * len(chances), 3.6), layout="constrained", squeeze=False)
    for axis, (case, chance) in zip(axes[0], chances.items(), strict=True):
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":", label="one of the values in sight")
        for name, cell in results["cells"].items():
            arm, its = name.split(", ", 1)
            if its.startswith(case):
                examples, right = zip(*cell["curve"], strict=True)
                best = np.max(np.reshape(right, (len(right), -1)), axis=1)
                axis.plot(np.array(examples) / 1000, best, color=COLOURS[arm], label=arm, linewidth=1.2)
        axis.set(title=case, xlabel="examples, thousands", ylim=(0, 1.03))
    axes[0, 0].set_ylabel("answers right")
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    draw(json.loads(source.read_text()), target)
