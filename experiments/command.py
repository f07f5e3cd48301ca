"""Command line of the paper's experiments that are not studies (`study.py`); results survive a kill.

    python -m experiments.NAME.run                    the preset `cpu` -> experiments/NAME/results.json, and the ledger
    python -m experiments.NAME.run --preset=gpu       -> gpu.json beside it
    python -m experiments.NAME.run --sweep            learning rates -> sweep.json, where there is something to sweep
    python -m experiments.NAME.run --smoke --out=DIR  seconds, numbers without meaning
    python -m experiments.NAME.plot                   redraw the figure of results.json

A preset consists of cells, each a function without arguments that returns a JSON object. Each cell is saved in
runs/NAME/PRESET.json as soon as it is computed, so the same command resumes after a kill, also on another day or
machine. A cell records where it was computed; the stamp of the results records where they were assembled. `--again`
recomputes everything. Use it after a change of the code; after a change of the preset, cells are recomputed anyway.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

from experiments import ledger, stamp
from experiments.results import draw, write_json
from rwkv_jax import files
from rwkv_jax.command import Parser, reported
from rwkv_jax.files import read_json, user_path

VERDICTS = ("reproduced", "same sign", "not resolved", "contradicted", "not comparable", "no claim")
STAMPED = ("commit", "date", "jax", "processor", "cores", "xla_flags", "devices")  # of each cell
STOPPED = "stopped; finished runs are kept, the same command resumes"
Cells = dict[str, Callable[[], dict]]


def main(
    folder: Path, doc: str, presets: dict, cells: Callable, conclude: Callable, sweep=None, options=None, argv=None
) -> int:
    """Parse `argv`, compute the missing cells, write results and figure; return the exit code.

    Args:
        folder: the experiment's folder, whose `plot.py` has `draw(results, path)`.
        doc: docstring of `run.py`; its first paragraph describes the command.
        presets: frozen dataclasses by name: "smoke", "cpu", and others. `--text` sets a field `text`.
        cells: (preset, folder for training runs and other files, which is kept) -> the preset's cells by name.
        conclude: (preset, values by cell) -> JSON object of conclusions. Its "ledger" is a list of rows as `claim`
            returns them; its "not_run" a list of rows as `not_run` returns them.
        sweep: (preset, path of sweep.json) -> None.
        options: help of additional options by name, such as {"model": "released weights"} for `--model`. `cells` gets
            each value by name ("_" for "-"), None if not given. Cells that a value adds need names that depend on it.
    """
    name = folder.name
    parser = Parser(
        prog=f"python -m experiments.{name}.run",
        description=doc.split("\n\n")[0],
        epilog=doc.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=[p for p in presets if p != "smoke"], default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds, to check that it runs")
    parser.add_argument("--again", action="store_true", help="recompute every cell")
    parser.add_argument("--out", type=user_path, default=folder, help="output folder")
    if hasattr(presets["cpu"], "text"):
        parser.add_argument("--text", help="a text file or folder instead of the embedded corpus")
    for option, about in (options or {}).items():
        parser.add_argument(f"--{option}", help=about)
    if sweep:
        parser.add_argument("--sweep", action="store_true", help="sweep learning rates instead")

    @reported(STOPPED)
    def computed(argv) -> None:
        args = vars(parser.parse_args(argv))
        label = "smoke" if args["smoke"] else args["preset"]
        preset = presets[label] if not args.get("text") else replace(presets[label], text=args["text"])
        if label == "smoke" and args["out"] == folder:
            raise ValueError("--smoke would overwrite real results: give it --out=FOLDER")
        files.check_output_folder(args["out"])
        args["out"].mkdir(parents=True, exist_ok=True)
        if args.get("sweep"):
            sweep(preset, args["out"] / "sweep.json")
            return
        with tempfile.TemporaryDirectory() as elsewhere:
            kept = Path(elsewhere if label == "smoke" else "runs") / name / f"{label}.json"
            added = {name: args[name] for name in (option.replace("-", "_") for option in options or {})}
            values = compute(cells(preset, kept.with_suffix(""), **added), preset, kept, args["again"])
        results = {"preset": label, "fields": fields(preset), **conclude(preset, bare(values)), "cells": values}
        assert all(row["verdict"] in VERDICTS for row in results.get("ledger", ()))
        results["wall_seconds"] = sum(cell["wall_seconds"] for cell in values.values())
        path = args["out"] / ("results.json" if label in ("smoke", "cpu") else f"{label}.json")
        write_json(path, results | {"stamp": stamp.stamp()})
        draw(name, path)
        if args["out"].resolve() == (ledger.HERE / name).resolve():
            ledger.refresh()
        for row in results.get("ledger", ()):
            print("{artefact}: {ours} (paper: {paper}): {verdict}".format(**row))
        print(f"written: {path}")

    return computed(argv)


def claim(artefact: str, paper: str, ours: str, verdict: str, **more: str) -> dict:
    """Return a row of the ledger.

    Args:
        ours: one number, with its interval if it has one.
        verdict: one of `VERDICTS`; "not comparable" if the run could not have reproduced the claim, "no claim" if the
            paper makes none.
        more: "run", the size of the run in a few words; "details", numbers that stay in the results file.
    """
    return {"artefact": artefact, "paper": paper, "ours": ours, "verdict": verdict, **more}


def not_run(
    artefact: str, command: str, hours: float, hardware: str = "one H100 or H200", why: str = "no GPU for so long"
) -> dict:
    """Return a row of the table of experiments that were not run."""
    return {"artefact": artefact, "command": command, "hardware": hardware, "hours": hours, "why": why}


def compute(cells: Cells, preset, kept: Path, again: bool = False) -> dict:
    """Return the values of all cells, cached in `kept` or computed, with seconds, commit, date and hardware."""
    found = read_json(kept) if kept.exists() and not again else {}
    if found.get("fields") != fields(preset):
        found = {"fields": fields(preset), "cells": {}}
    done = dict(found["cells"])  # cells that only options ask for stay too
    for i, (name, cell) in enumerate(cells.items(), 1):
        if name in done:
            print(f"[{i}/{len(cells)}] {name}: kept from {done[name]['date']}", file=sys.stderr, flush=True)
            continue
        print(f"[{i}/{len(cells)}] {name}", file=sys.stderr, flush=True)
        began, value = time.perf_counter(), cell()
        its = stamp.stamp()
        its["jax"] = its["versions"]["jax"]
        done[name] = value | {"wall_seconds": round(time.perf_counter() - began, 1)}
        done[name] |= {key: its[key] for key in STAMPED}
        write_json(kept, found | {"cells": done})
    return {name: done[name] for name in cells}


def bare(values: dict) -> dict:
    """Return the values of cells without their stamps."""
    added = ("hash", "wall_seconds", *STAMPED)
    return {n: {k: v for k, v in value.items() if k not in added} for n, value in values.items()}


def fields(preset) -> dict:
    """Return a preset as JSON values."""
    return json.loads(json.dumps(asdict(preset) if is_dataclass(preset) else preset))
