"""Results files: written atomically, drawn as figures, printed as tables."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from rwkv_jax.command import end, reported
from rwkv_jax.files import read_json, to_json, user_path

HERE = Path(__file__).parent


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(to_json(value, indent=1) + "\n")
    beside.replace(path)


def draw(name: str, path: Path) -> Path:
    """Draw the figure of a results file beside it: figure.png of results.json, gpu.png of gpu.json.

    Uses `draw` of the experiment's plot.py, or else that of `experiments.figures`.
    """
    own = name and (HERE / name / "plot.py").exists()
    module = importlib.import_module(f"experiments.{name}.plot" if own else "experiments.figures")
    figure = path.with_name("figure.png" if path.name == "results.json" else f"{path.stem}.png")
    module.draw(read_json(path), figure)
    return figure


def redraw(name: str) -> None:
    """Redraw the committed figures of an experiment: `python -m experiments.NAME.plot`."""

    def redrawn(argv) -> None:
        for path in (HERE / name / file for file in ("results.json", "gpu.json")):
            if path.exists():
                print(f"written: {draw(name, path)}")

    end(reported()(redrawn)())


def print_table(render: Callable, folder: Path) -> None:
    """Print the table of a results file, by default the committed one: `python -m experiments.NAME.table [FILE]`."""

    def printed(argv) -> None:
        print(render(read_json(user_path(sys.argv[1] if len(sys.argv) > 1 else folder / "results.json"))))

    end(reported()(printed)())
