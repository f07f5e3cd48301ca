"""The figure of results.json: that of every study."""

from pathlib import Path

from experiments import figures
from experiments.results import redraw


def draw(results: dict, path: Path) -> None:
    """Write the figure as PNG."""
    figures.draw(results, path, "bits per byte in float32")


if __name__ == "__main__":
    redraw("bf16")
