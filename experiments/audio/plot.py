"""The figure of `results.json`: spectrograms of held-out music, of what continues it, and of the end of that."""

import numpy as np

from experiments.figures import plt, saved


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
    saved(figure, path, dpi=72)
