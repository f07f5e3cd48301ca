"""`metrics.jsonl`: one JSON object a log step, readable while the run still writes it."""

import json
import math
import os
from pathlib import Path
from typing import Any

# What a run goes on from, and hence must be of its type.
_RESUMED = {"step": int, "began": int | float, "train_seconds": int | float, "lost_seconds": dict}


def append(path, row: dict[str, Any]) -> None:
    """Add `row` as one line, handed to the operating system before this returns.

    Values are JSON's own, or NumPy and JAX scalars. A number that is not finite becomes null.
    """
    line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path) -> list[dict[str, Any]]:
    """The rows of `path`. A last line without its newline was cut off while being written and does not count.

    Raises:
      ValueError: a whole line is no JSON object, with its number.
    """
    return [row for row, _ in _rows(path)]


def cut_back(path, step: int) -> None:
    """Drop the rows beyond `step` and a last line that was cut off: what a run resumed at `step` writes again.

    The rest stays as it is, byte for byte; the file is replaced in one move. A missing file stays missing.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [line for row, line in _rows(path) if row.get("step", step) <= step]
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _rows(path):
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is no JSON object: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is {type(row).__name__}, expected a JSON object")
            for name, kind in _RESUMED.items():
                if name in row and not isinstance(row[name], kind):
                    raise ValueError(
                        f"{path}: line {number}: {name} is {row[name]!r}, expected {getattr(kind, '__name__', kind)}"
                    )
            yield row, line


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
