"""Training runs drawn together, and what differs in their configs.

    python -m experiments.curves.plot runs/tiny runs/tiny-transformer
    python -m experiments.curves.plot runs/* --x=flops --y=bits_per_byte,grad_norm --smooth=200 --output=sweep.pdf

A run is a workdir of `rwkv_jax.train`, finished or not. The table lists each config field that differs between runs,
where a field that an older config lacks counts as today's default, then the last values drawn. Dashed lines with dots
are validation.
"""

import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.ticker import EngFormatter

from experiments.figures import plt
from rwkv_jax import files, hardware, models
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import read_json, user_path, written
from rwkv_jax.train import metrics, run_config

AXES = {"tokens": "training tokens", "step": "steps", "seconds": "training time, seconds", "flops": "training FLOPs"}
VALIDATION = {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4, "markerfacecolor": "w"}


class Run(NamedTuple):
    name: str  # as many last parts of its path as tell it from the others
    model: dict
    fields: dict  # of the config by path, "optim.lr", and of the corpus and versions
    curves: dict  # every number of the log: {name: {step: value}}, steps ascending


def read(workdirs) -> list[Run]:
    """The runs of some workdirs, each once. ValueError where one holds no run, or a damaged one."""
    folders = list({user_path(w).resolve(): user_path(w).absolute() for w in workdirs}.values())
    depth = next(n for n in itertools.count(1) if len({f.parts[-n:] for f in folders}) == len(folders))
    return [_read(folder, "/".join(folder.parts[-depth:])) for folder in folders]


def _read(folder, name):
    config, curves = folder / "config.json", {}
    if not config.is_file():
        raise ValueError(f"{folder} is no training run: it has no config.json")
    try:
        record = read_json(config)
        default = json.loads(json.dumps(run_config.default().to_dict()))
        fields = flatten_dict(default, sep=".") | flatten_dict(record["config"], sep=".")
        fields |= flatten_dict({key: record.get(key, {}) for key in ("corpus", "versions")}, sep=".")
        model = dict(record["model"])
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{config} is not that of a training run ({type(error).__name__}: {error})") from error
    for row in metrics.logged(folder / "metrics.jsonl"):
        for metric, value in metrics.scalars(row) if "step" in row else ():
            curves.setdefault(metric, {})[row["step"]] = value  # of a step that was taken twice, the later
    return Run(name, model, fields, {metric: dict(sorted(curve.items())) for metric, curve in curves.items()})


def points(run, metric, axis="step") -> tuple[np.ndarray, np.ndarray]:
    """x and y [N] of what a run has logged of a metric, empty where it has not."""
    curve = run.curves.get(metric, {})
    x_N, y_N = np.array(list(curve), float), np.array(list(curve.values()), float)
    if axis == "seconds" and curve:
        clock = run.curves.get("train_seconds")
        if not clock:
            raise ValueError(f"{run.name} has not logged train_seconds, expected --x=tokens or another")
        return np.interp(x_N, list(clock), list(clock.values())), y_N  # not every row tells the time
    if axis in ("tokens", "flops"):
        x_N *= run.fields["batch_size"] * run.fields["seq_len"]
    if axis == "flops":
        x_N *= hardware.flops_per_token(models.build(**run.model), run.fields["seq_len"])
    return x_N, y_N


def chosen(runs, wanted) -> list[str]:
    """The metrics that are wanted, each with those inside it, as "k_max/0" and "k_max/1" are in "k_max"."""
    logged = dict.fromkeys(metric for run in runs for metric in run.curves)
    found = {}
    for name in wanted:
        inside = [metric for metric in logged if f"{metric}/".startswith(f"{name}/")]
        if not inside:
            there = ", ".join(dict.fromkeys(metric.partition("/")[0] for metric in logged))
            raise ValueError(f"no run has logged {name!r}, there is {there or 'nothing yet'}")
        found |= dict.fromkeys(inside)
    return list(found)


def differing(runs) -> dict[str, list]:
    """{field: its value in each run} of the fields that are not equal in all; None where a run has no such field."""
    fields = dict.fromkeys(field for run in runs for field in run.fields)
    values = {field: [run.fields.get(field) for run in runs] for field in fields}
    return {field: row for field, row in values.items() if any(value != row[0] for value in row)}


def table(runs, drawn) -> str:
    """A column for each run: the fields that differ, and the last values of the metrics drawn."""
    rows = [("", *(run.name for run in runs))]
    rows += [(field, *map(str, values)) for field, values in differing(runs).items()]
    for metric in dict.fromkeys(m for name in drawn for m in (name, f"valid_{name}")):
        last = [[*run.curves.get(metric, {}).values()][-1:] for run in runs]
        if any(last):
            rows.append((f"last {metric}", *(f"{y[0]:.5g}" if y else "-" for y in last)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def draw(runs, drawn, path, axis="tokens", smooth=0) -> None:
    """Write the figure, a panel for each metric, in the format that the name of `path` ends in."""
    figure, panels = plt.subplots(1, len(drawn), figsize=(1 + 5 * len(drawn), 4), squeeze=False, layout="constrained")
    colours = plt.colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
    for metric, panel in zip(drawn, panels.flat, strict=True):
        for number, (run, colour) in enumerate(zip(runs, colours, strict=True)):
            x_N, y_N = points(run, metric, axis)
            panel.plot(x_N, smoothed(points(run, metric), smooth), color=colour, label=str(number))
            if smooth:
                panel.plot(x_N, y_N, color=colour, linewidth=0.5, alpha=0.25)
            panel.plot(*points(run, f"valid_{metric}", axis), color=colour, **VALIDATION)
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.set(xlabel=AXES[axis], ylabel=metric.replace("_", " "))
    legend = panels[0, 0].legend()
    for text, run in zip(legend.get_texts(), runs, strict=True):  # a name may hold $, which begins a formula
        text.set(text=os.fsencode(run.name).decode(errors="replace"), parse_math=False)
    with written(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:] or "png")
    plt.close(figure)


def smoothed(points, steps):
    """[N] mean over the values logged within half of `steps` to either side."""
    steps_N, y_N = points
    begin_N = np.searchsorted(steps_N, steps_N - steps / 2)
    end_N = np.searchsorted(steps_N, steps_N + steps / 2, side="right")
    return np.array([y_N[begin:end].mean() for begin, end in zip(begin_N, end_N, strict=True)])


@reported("stopped; nothing was written")
def main(argv=None) -> None:
    parser = Parser(
        prog="python -m experiments.curves.plot", description="Draw training runs together; list how they differ."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir of rwkv_jax.train")
    parser.add_argument("--x", choices=AXES, default="tokens", help="(%(default)s)")
    parser.add_argument("--y", metavar="METRIC[,METRIC ...]", default="loss_nats", help="of the log (%(default)s)")
    parser.add_argument("--smooth", type=int, default=0, metavar="STEPS", help="mean over so many (%(default)s)")
    parser.add_argument(
        "--output", type=user_path, default=Path("curves.png"), metavar="FILE.png", help="(%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.smooth < 0:
        raise ValueError(f"smooth is {args.smooth}, expected a number of steps, 0 or more")
    files.check_output(args.output)
    runs = read(args.runs)
    drawn = chosen(runs, args.y.split(","))
    draw(runs, drawn, args.output, args.x, args.smooth)
    print(f"{table(runs, drawn)}\nwritten: {args.output}")


if __name__ == "__main__":
    end(main())
