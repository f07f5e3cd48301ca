"""Training runs drawn together, and what differs in their configs.

    python -m experiments.curves.plot runs/tiny runs/tiny-transformer
    python -m experiments.curves.plot runs/* --x=flops --y=bits_per_byte,grad_norm --smooth=200 --output=sweep.pdf

A run is a workdir of `rwkv_jax.train`, whether it has ended or goes on. The table tells each field that is not the
same in all configs, where one that an older config lacks counts as today's default, then the last values drawn.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.lines import Line2D

from experiments.speed.plot import COLOURS
from rwkv_jax import hardware, models
from rwkv_jax.train import metrics, run_config
from rwkv_jax.train.workdir import FREE_FIELDS

AXES = {  # label, and units by size: the axis has the largest that a curve reaches
    "tokens": ("training tokens", {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}),
    "step": ("steps", {1e6: "millions", 1e4: "thousands"}),
    "seconds": ("training time", {86400: "days", 3600: "hours", 60: "minutes", 1: "seconds"}),
    "flops": ("training FLOPs", {10.0**power: f"$10^{{{power}}}$" for power in range(24, 3, -3)}),
}
LABELS = {
    "loss_nats": "loss, nats a token",
    "bits_per_byte": "bits per byte",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}
EVALUATED = {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4, "markerfacecolor": "w", "zorder": 3}
BESIDE = ("corpus.", "versions.", "xla_flags")  # what begins so tells runs apart but is no field of their configs
LEGEND_CHARS = 40  # where what differs takes more, a run goes by its name
COLUMNS = 3  # of panels


class Run(NamedTuple):
    name: str  # as many last parts of its path as tell it from the others
    model: dict
    fields: dict  # of the config by path, "optim.lr", and those of `BESIDE`
    curves: dict  # every number of the log: {name: {step: value}}, steps ascending


def read(workdirs) -> list[Run]:
    """The runs of some workdirs, each once. ValueError where one holds no run, or a damaged one."""
    folders = list(dict.fromkeys(Path(workdir).resolve() for workdir in workdirs))
    depth = next(n for n in itertools.count(1) if len({f.parts[-n:] for f in folders}) == len(folders))
    return [_read(folder, "/".join(folder.parts[-depth:])) for folder in folders]


def _read(folder, name):
    config, log, curves = folder / "config.json", folder / "metrics.jsonl", {}
    if not config.is_file():
        raise ValueError(f"{folder} is no training run: it has no config.json")
    try:
        record = json.loads(config.read_text())
        default = json.loads(json.dumps(run_config.default().to_dict()))
        fields = flatten_dict(default, sep=".") | flatten_dict(record["config"], sep=".")
        fields |= flatten_dict({key: record.get(key, {}) for key in ("corpus", "versions")}, sep=".")
        fields |= {"xla_flags": record.get("xla_flags", ""), "corpus.sha256": fields["corpus.sha256"][:12]}
        model = dict(record["model"])
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{config} is not that of a training run ({type(error).__name__}: {error})") from error
    for row in metrics.logged(log):
        for metric, value in metrics.scalars(row) if "step" in row else ():
            curves.setdefault(metric, {})[row["step"]] = value  # of a step that was taken twice, the later
    return Run(name, model, fields, {metric: dict(sorted(curve.items())) for metric, curve in curves.items()})


def points(run, metric, axis) -> tuple[np.ndarray, np.ndarray]:
    """x and y [N] of what a run has logged of a metric, empty where it has not."""
    curve = run.curves.get(metric, {})
    steps_N, y_N = np.array(list(curve), float), np.array(list(curve.values()), float)
    if axis == "step" or not curve:
        return steps_N, y_N
    if axis == "seconds":
        clock = run.curves.get("train_seconds")
        if not clock:
            raise ValueError(f"{run.name} has not logged train_seconds, expected --x=tokens or another")
        return np.interp(steps_N, list(clock), list(clock.values())), y_N  # not every row tells the time
    tokens_N = steps_N * run.fields["batch_size"] * run.fields["seq_len"]
    if axis == "flops":
        tokens_N *= hardware.flops_per_token(models.build(**run.model), run.fields["seq_len"])
    return tokens_N, y_N


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


def labels(runs) -> list[str]:
    """What the legend calls each run: what differs, if it changes numbers and takes few words, or else its name."""
    differ = {k: row for k, row in differing(runs).items() if k not in FREE_FIELDS and not k.startswith(BESIDE)}
    differ = dict(sorted(differ.items(), key=lambda item: item[0] != "model.name"))
    short = [field.removesuffix(".name").rpartition(".")[2] for field in differ]
    told = [", ".join(map("{} {}".format, short, row)) for row in zip(*differ.values(), strict=True)]
    clear = len(set(short)) == len(short) and len(set(told)) == len(runs) > 1
    return told if clear and max(map(len, told)) <= LEGEND_CHARS else [run.name for run in runs]


def title(runs) -> str:
    """What all runs have in common of their model and corpus."""
    facts = (("model.name",), ("model.num_layers", "model.dim"), ("corpus.name",))
    common = [fact for fact in facts if not set(fact) & differing(runs).keys()]
    return ", ".join(" x ".join(str(runs[0].fields.get(field)) for field in fact) for fact in common)


def table(runs, drawn) -> str:
    """What differs and the last values of the metrics drawn, a row for each, or for each run where those are more."""
    rows = [(field, *map(str, row)) for field, row in differing(runs).items()]
    for metric in dict.fromkeys(m for name in drawn for m in (name, f"valid_{name}")):
        last = [[*run.curves.get(metric, {}).values()][-1:] for run in runs]
        rows += [(f"last {metric}", *(f"{y[0]:.5g}" if y else "-" for y in last))] if any(last) else []
    rows = [("", *(run.name for run in runs)), *rows]
    rows = rows if len(rows) >= len(runs) else list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda row: "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))
    return "\n".join([line(rows[0]), "-" * len(line(rows[0])), *map(line, rows[1:])])


def draw(runs, drawn, path, axis="tokens", smooth=0) -> None:
    """Write the figure, a panel for each metric, in the format that the name of `path` ends in."""
    colours = COLOURS if len(runs) <= len(COLOURS) else plt.colormaps["viridis"](np.linspace(0, 0.95, len(runs)))
    label, units = AXES[axis]
    furthest = max(points(run, metric, axis)[0].max(initial=0) for run in runs for metric in drawn)
    scale = next((scale for scale in units if furthest >= scale), 1)
    rows, columns = math.ceil(len(drawn) / COLUMNS), min(len(drawn), COLUMNS)
    size = (7.5, 4) if len(drawn) == 1 else (4 * columns, 3 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles = [Line2D([], [], color=c, label=text) for c, text in zip(colours, labels(runs), strict=False)]
    for metric, panel in zip(drawn, panels.flat, strict=False):
        _draw_panel(panel, runs, metric, axis, smooth, scale, colours)
        panel.set_xlabel(f"{label}, {units[scale]}" if scale in units else label)
    for panel in panels.flat[len(drawn) :]:
        panel.remove()
    validated = any(f"valid_{metric}" in run.curves for metric in drawn for run in runs)
    if validated or smooth:
        mean = f", mean over {smooth:,} steps" if smooth else ""
        handles.append(Line2D([], [], color="grey", label=f"training{mean}"))
    if validated:
        handles.append(Line2D([], [], color="grey", label="validation", **EVALUATED))
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    for text in (*legend.get_texts(), panels[0, 0].set_title(title(runs), fontsize=10, loc="left")):
        text.set_parse_math(False)  # a dollar is a dollar
    beside = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(beside, dpi=150, format=path.suffix[1:] or "png")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
        plt.close(figure)


def _draw_panel(panel, runs, metric, axis, smooth, scale, colours):
    """A metric and its evaluation. What a curve comes down in its first twentieth may lie above the panel."""
    name, late = metric.removeprefix("valid_"), []
    for run, colour in zip(runs, colours, strict=False):
        curves = [points(run, f"valid_{name}", axis)]
        x_N, y_N = curves[0]
        panel.plot(x_N / scale, y_N, color=colour, markevery=max(1, len(x_N) // 20), **EVALUATED)
        if name == metric:
            curves.append(points(run, metric, axis))
            x_N, y_N = curves[1]
            look = {"linewidth": 1.2 if smooth else 0.9, "marker": "." if len(x_N) == 1 else ""}
            panel.plot(x_N / scale, smoothed(points(run, metric, "step"), smooth), color=colour, **look)
            if smooth:
                panel.plot(x_N / scale, y_N, color=colour, linewidth=0.5, alpha=0.25, zorder=1)
        late += [y_N[x_N >= 0.95 * x_N[0] + 0.05 * x_N[-1]].max() for x_N, y_N in curves if len(x_N)]
    low, high = panel.dataLim.intervaly
    if low < max(late) < high:
        panel.set_ylim(low - 0.05 * (max(late) - low), max(late) + 0.05 * (max(late) - low))
    label = LABELS.get(name, name.replace("_", " ").replace("/", ": "))
    panel.set_ylabel(label if name == metric else f"validation {label}")
    panel.grid(alpha=0.3)


def smoothed(points, steps):
    """[N] mean over the values logged within half of `steps` to either side."""
    steps_N, y_N = points
    begin_N = np.searchsorted(steps_N, steps_N - steps / 2)
    end_N = np.searchsorted(steps_N, steps_N + steps / 2, side="right")
    return np.array([y_N[begin:end].mean() for begin, end in zip(begin_N, end_N, strict=True)])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.curves.plot", description="Draw training runs together; tell how they differ."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir of rwkv_jax.train")
    parser.add_argument("--x", choices=AXES, default="tokens", help="(%(default)s)")
    parser.add_argument("--y", metavar="METRIC[,METRIC ...]", default="loss_nats", help="of the log (%(default)s)")
    parser.add_argument("--smooth", type=int, default=0, metavar="STEPS", help="mean over so many (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), metavar="FILE.png", help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.smooth < 0:
            raise ValueError(f"smooth is {args.smooth}, expected a number of steps, 0 or more")
        if args.output.is_dir():
            raise ValueError(f"output is {args.output}, a folder, expected a file such as curves.png")
        runs = read(args.runs)
        drawn = chosen(runs, args.y.split(","))
        draw(runs, drawn, args.output, args.x, args.smooth)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{table(runs, drawn)}\nwritten: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
