"""The figure of `results.json`: spectrograms of held-out music, of what continues it, and of the end of that.

python -m experiments.audio.plot [results.json [figure.png]]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np


def draw(results, path) -> None:
    """Write the figure as PNG."""
    fields, panels = results["fields"], results["cells"]["sound"]["spectrograms"]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.3), layout="constrained", sharey=True)
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        decibels = np.array([[int(digit, 36) for digit in row] for row in rows]) / 35 * 60 - 60
        highest = len(rows) / 512 * fields["rate"]  # windows of 512 samples
        extent = (0, fields["excerpt_seconds"], 0, highest)
        image = axis.imshow(
            decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", interpolation="nearest"
        )
        axis.set(title=name, xlabel="seconds")
    axes[0].set_ylabel("Hz")
    figure.colorbar(image, ax=axes, label="dB", shrink=0.8)
    figure.savefig(path, dpi=72)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    draw(json.loads(source.read_text()), target)
