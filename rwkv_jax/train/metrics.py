"""`metrics.jsonl`: one JSON object a log step, readable while the run still writes it; TensorBoard and W&B beside it.

A row has its `step`, and numbers by name; a dictionary or list of numbers under one name is a curve for each.
"""

import contextlib
import importlib.util
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_jax import files

# Types of the fields that a resumed run reads.
_RESUMED = {"step": int, "began": int | float, "train_seconds": int | float, "lost_seconds": dict}


def check_installed(tensorboard: bool = False, wandb_project: str = "") -> None:
    """Raise ValueError, with the command that installs it, if a package that the config needs is missing."""
    for wanted, field, package in (
        (tensorboard, "tensorboard", "tensorboardX"),
        (wandb_project, "wandb_project", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"config field logging.{field} needs {package}, which is missing: pip install {package}")


@contextlib.contextmanager
def opened(workdir, step: int = 0, config: dict | None = None, *, tensorboard: bool = False, wandb_project: str = ""):
    """Yield `write(row)`, which appends to `workdir/metrics.jsonl` and to the loggers asked for.

    Args:
      step: where the run starts or resumes; later events of TensorBoard are replaced.
      config: of the run, shown by W&B.
      tensorboard: events in `workdir/tensorboard`, on disk within a second.
      wandb_project: a run of that project, the same one after a restart (`workdir/wandb_id`). Its x-axis is "step",
        and repeated steps are logged again. W&B itself reads `WANDB_MODE=offline` and the like.
    """
    workdir, writers = Path(workdir), []
    with contextlib.ExitStack() as stack:
        if tensorboard:
            from tensorboardX import SummaryWriter

            more = {"flush_secs": 1, "filename_suffix": f".{step}"}  # it would overwrite a file of the same second
            board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, **more)
            stack.enter_context(board)
            writers.append(lambda row: [board.add_scalar(name, x, row["step"]) for name, x in scalars(row)])
        if wandb_project:
            import wandb

            run = wandb.init(
                project=wandb_project, id=_wandb_id(workdir), resume="allow", dir=str(workdir), config=config
            )
            stack.callback(run.finish)
            run.define_metric("*", step_metric="step")
            writers.append(lambda row: run.log({"step": row["step"], **dict(scalars(row))}))

        def write(row):
            append(workdir / "metrics.jsonl", row)
            for to in writers:
                to(row)

        yield write


def _wandb_id(workdir):
    path = workdir / "wandb_id"
    if not path.exists():
        with files.written(path) as file:
            file.write(secrets.token_hex(4).encode())
    return path.read_text()


def scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row except its step, nested ones named by a path: "lost_seconds/save", "k_max/3"."""
    for name, value in row.items():
        value = files.plain(value)
        if isinstance(value, dict | list):
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            yield from ((f"{name}/{key}", x) for key, x in scalars(inner))
        elif isinstance(value, int | float) and name != "step":
            yield name, value


def append(path, row: dict[str, Any]) -> None:
    """Add `row` as one line, passed to the operating system before this returns.

    Values are JSON's own, or NumPy and JAX arrays. A number that is not finite becomes null.
    """
    line = files.to_json(row)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def logged(path) -> list[dict[str, Any]]:
    """The rows of `path`, none where it is missing. A truncated last line is ignored.

    Raises:
      ValueError: a complete line is not a JSON object, with its number.
    """
    return [row for row, _ in _rows(path)] if Path(path).exists() else []


def cut_back(path, step: int) -> None:
    """Drop the rows beyond `step`, which a run resumed there writes again, and a truncated last line.

    The rest is kept byte for byte; the file is replaced atomically. A missing file stays missing.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [line for row, line in _rows(path) if row.get("step", step) <= step]
    with files.written(path) as file:
        file.writelines(kept)


def _rows(path):
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = files.parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not a JSON object: {error}") from error
            for name, kind in _RESUMED.items():
                if name in row and not isinstance(row[name], kind):
                    raise ValueError(
                        f"{path}: line {number}: {name} is {row[name]!r}, expected {getattr(kind, '__name__', kind)}"
                    )
            yield row, line
