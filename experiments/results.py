"""Results files: written atomically, drawn as figures, printed as tables."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from rwkv_jax.command import end, reported
from rwkv_jax.files import read_json, to_json, user_path, written

HERE = Path(__file__).parent


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.write((to_json(value, indent=1) + "\n").encode())


def draw(name: str, path: Path) -> Path:
    """Draw the figure of a results file beside it: figure.png of results.json, long.png of long.json.

    Uses `draw` of the experiment's plot.py, or else that of `experiments.figures`.
    """
    own = name and (HERE / name / "plot.py").exists()
    module = importlib.import_module(f"experiments.{name}.plot" if own else "experiments.figures")
    module.draw(read_json(path), figure_of(path))
    return figure_of(path)


def figure_of(path: Path) -> Path:
    return path.with_name("figure.png" if path.name == "results.json" else f"{path.stem}.png")


def redraw(name: str) -> None:
    """Redraw the committed figures of an experiment: `python -m experiments.NAME.plot`."""

    def redrawn(argv) -> None:
        for path in sorted((HERE / name).glob("*.json")):
            if path.name == "results.json" or figure_of(path).exists():  # others are sweeps
                print(f"written: {draw(name, path)}")

    end(reported()(redrawn)())


def print_table(render: Callable, folder: Path) -> None:
    """Print the table of a results file, by default the committed one: `python -m experiments.NAME.table [FILE]`."""

    def printed(argv) -> None:
        print(render(read_json(user_path(sys.argv[1] if len(sys.argv) > 1 else folder / "results.json"))))

    end(reported()(printed)())
