"""The figure of results.json: that of every study."""

from experiments.figures import draw
from experiments.results import redraw

__all__ = ["draw"]


if __name__ == "__main__":
    redraw("ablations_rwkv7")
