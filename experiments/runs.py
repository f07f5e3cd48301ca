"""Cached training runs and other measurements, each under a hash of everything its numbers depend on.

A cell is one result of an experiment: a run with its measures, or any other computation that takes minutes. The cell's
file holds its numbers next to the hashed fields, as plain JSON, so that a person can read what the numbers belong to.
"""

import ast
import hashlib
import inspect
import json
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from experiments import command, stamp
from experiments.results import write_json
from rwkv_jax import checkpoint, data, train
from rwkv_jax.files import read_json, user_path
from rwkv_jax.runs import describe
from rwkv_jax.train import metrics
from rwkv_jax.train.workdir import FREE_FIELDS

CODE = 2  # increment it when a code change alters what runs compute: cached runs are then recomputed
# Switches that were there when `CODE` became 2: hashed although a run leaves them at None. Others count once they are
# set, so that a new switch or kind of layer leaves all finished runs valid.
SWITCHES = {
    f"model.variant.{name}"
    for name in (
        "activation", "bonus", "current_token", "in_context_rate", "matrix_init", "previous_token", "receptance",
        "removal", "shift_v", "token_shift", "value_residual",
    )
}  # fmt: skip
# Config fields that training does not depend on. Evaluation fields count, because results contain evaluations.
FREE = {*FREE_FIELDS, "tokenizer"} - {"eval_every", "eval_tokens", "finetune.model"}
flat = partial(flatten_dict, sep=".")  # {"a.b": value} of nested or dotted fields


class Cell(NamedTuple):
    identity: dict  # everything its numbers depend on, as JSON
    compute: Callable[[], dict]


def hash_of(identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def fixed(config) -> dict:
    """Return the config fields that numbers depend on; an initial weights file counts by its content."""
    fields = flat(config.to_dict())
    weights = user_path(fields.get("finetune.model") or ".")
    if weights.is_file():
        fields["finetune.model"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    young = {x for x in fields.keys() - SWITCHES if x.startswith("model.variant.") and fields[x] is None}
    return json.loads(json.dumps({name: value for name, value in fields.items() if name not in FREE | young}))


def identity_of(function: Callable) -> dict:
    """Return the name, parameters and source hash of a function, without docstring and comments.

    The functions that it calls do not count.
    """
    parameters = [function.args, function.keywords] if isinstance(function, partial) else []
    function = getattr(function, "func", function)
    text = textwrap.dedent(inspect.getsource(function))
    if text.startswith(("def ", "@")):  # not a lambda, whose source is a line of another statement
        tree = ast.parse(text)
        if ast.get_docstring(tree.body[0]):
            del tree.body[0].body[0]
        text = ast.unparse(tree)
    source = hashlib.sha256(text.encode()).hexdigest()[:16]
    return json.loads(json.dumps({"name": function.__qualname__, "source": source, "parameters": parameters}))


def path_of_kept(cell: Cell, folder: Path) -> Path:
    """Return the path of a cell's file, whether or not it exists yet."""
    return folder / f"{hash_of(cell.identity)}.json"


def kept(name: str, cell: Cell, folder: Path) -> dict:
    """Return the numbers of a cell, read from `folder`, or computed and saved there with date, commit and hardware."""
    path = path_of_kept(cell, folder)
    if path.exists():
        numbers = read_json(path)["numbers"]
        print(f"{name}: kept from {numbers['date']}", file=sys.stderr, flush=True)
        return numbers
    print(name, file=sys.stderr, flush=True)
    began, numbers = time.perf_counter(), cell.compute()
    its = stamp.stamp()
    numbers |= {"wall_seconds": round(time.perf_counter() - began, 1), "jax": its["versions"]["jax"]}
    numbers |= {key: its[key] for key in command.STAMPED if key in its}
    numbers["hash"] = path.stem
    write_json(path, {"name": name, **cell.identity, "numbers": numbers})
    return numbers


def restore(cells: dict[str, Cell], results: dict, folder: Path) -> int:
    """Copy the cells that published results already have into `folder`; return how many are the same.

    A cell is the same if its hash is: nothing that its numbers depend on has changed.
    """
    same = {name: cell for name, cell in cells.items() if _hash_in(results, name) == hash_of(cell.identity)}
    for name, cell in same.items():
        path = path_of_kept(cell, folder)
        if not path.exists():
            write_json(path, {"name": name, **cell.identity, "numbers": results["cells"][name]})
    return len(same)


def _hash_in(results: dict, name: str) -> str | None:
    return results["cells"].get(name, {}).get("hash")


def stages(config, budgets: Sequence[int], budget: int) -> list:
    """Return the configs of the runs that lead to `budget` steps: segments of a trunk, then a decayed branch.

    The trunk has a constant rate. On a CPU the result equals, bit for bit, one run of `budget` steps with the trunk's
    warm-up. A segment of the trunk ends at each branching point, so a short budget does not wait for a long one. The
    decay takes the share `optim.decay` of a budget.
    """
    warmup, point, found = round(config.optim.warmup * max(budgets)), 0, []
    for steps in sorted(b for b in budgets if b <= budget):
        stretch, before = config.copy_and_resolve_references(), point
        point = steps - round(config.optim.decay * steps)
        stretch.steps = point
        # the warm-up ends before the first branch
        stretch.optim.update(schedule="constant", warmup=0.0 if before else warmup / point)
        found.append(stretch)
    branch = config.copy_and_resolve_references()
    branch.steps, branch.optim.warmup = budget, 0.0
    return [*found, branch]


def trained(configs: Sequence, folder: Path):
    """Train runs, each branching from the end of the previous one; return (model, params, workdirs).

    Workdirs stay in `folder`, named by the hash of everything that led to them, so that runs share trunks. Each run
    resumes.
    """
    workdirs = []
    for i, config in enumerate(configs):
        config = config.copy_and_resolve_references()
        identity = {"config": fixed(config), "code": CODE, "trunk": workdirs[-1].name if workdirs else ""}
        identity["corpus"] = data.prepare(config.corpus, config.tokenizer).sha256
        if workdirs:
            config.branch_from = f"{workdirs[-1]}/checkpoints/{configs[i - 1].steps}"
        workdirs.append(folder / hash_of(identity))
        is_trunk = i + 1 < len(configs)
        if is_trunk and config.steps in checkpoint.steps(workdirs[-1] / "checkpoints"):
            continue
        state = train.run(config, workdirs[-1])
        if int(state.step) < config.steps:
            raise KeyboardInterrupt
    return describe(workdirs[-1]), state.params, workdirs


def curve(workdirs: Sequence[Path]) -> dict:
    """Return the loss along consecutive runs: training loss in at most 40 points, and every evaluation.

    A point is a mean over logged steps.
    """
    rows = [row for workdir in workdirs for row in metrics.logged(workdir / "metrics.jsonl")]
    logged = [row for row in rows if "loss_nats" in row]
    groups = [[logged[i] for i in group] for group in np.array_split(np.arange(len(logged)), min(40, len(logged)))]
    mean = lambda group: round(float(np.mean([row["loss_nats"] for row in group])), 5)
    found = {"tokens": [group[-1]["tokens"] for group in groups], "loss_nats": list(map(mean, groups))}
    judged = [row for row in rows if "valid_loss_nats" in row]
    if judged:
        found["evaluated_steps"] = [row["step"] for row in judged]
        found["valid_loss_nats"] = [round(row["valid_loss_nats"], 5) for row in judged]
    return found
