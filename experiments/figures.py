"""Figures without a display, and the command of every `plot.py`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

__all__ = ["COLOURS", "main", "plt", "saved"]

# One colour an arm, in every figure.
COLOURS = {
    "rwkv4": "#c0392b",
    "transformer": "#2c3e50",
    "transformer+shift": "#2980b9",
    "transformer, no cache": "#7f8c8d",
    "lstm": "#27ae60",
    "hybrid": "#8e44ad",
}


def saved(figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG and let go of it."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def main(draw: Callable, file: str) -> None:
    """python -m experiments.NAME.plot [results.json [figure.png]]: `draw(results, path)`, by default beside `file`."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(file).parent / "results.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    draw(json.loads(source.read_text()), target)
