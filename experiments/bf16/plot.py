"""The figure of results.json: that of every study."""

from experiments import command
from experiments.figures import draw

__all__ = ["draw"]


if __name__ == "__main__":
    command.redraw("bf16")
