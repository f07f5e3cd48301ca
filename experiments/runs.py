"""Training runs and other numbers, each kept under a hash of all that it depends on.

A cell is one of an experiment's results: a run and what is measured of it, or anything else that takes minutes. Its
numbers stay in a file that holds in the clear what the hash is of, so that a person can read what it is.
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

import rwkv_jax
from experiments import command, stamp
from experiments.results import write_json
from rwkv_jax import checkpoint, data, train
from rwkv_jax.files import read_json, user_path
from rwkv_jax.train import metrics
from rwkv_jax.train.workdir import FREE_FIELDS

CODE = 2  # raise it with a change of the code that changes what runs compute: kept ones are then computed again
# What training does not depend on. Evaluations do count: results keep them.
FREE = {*FREE_FIELDS, "tokenizer"} - {"eval_every", "eval_tokens", "finetune.model"}
flat = partial(flatten_dict, sep=".")  # {"a.b": value} of nested or dotted fields


class Cell(NamedTuple):
    identity: dict  # all that its numbers depend on, as JSON
    compute: Callable[[], dict]


def hash_of(identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def fixed(config) -> dict:
    """The fields of a config that numbers depend on; weights that it starts from by their content."""
    fields = flat(config.to_dict())
    weights = user_path(fields.get("finetune.model") or ".")
    if weights.is_file():
        fields["finetune.model"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return json.loads(json.dumps({name: value for name, value in fields.items() if name not in FREE}))


def identity_of(function: Callable) -> dict:
    """Name, parameters and source of a function, without docstring and comments: what it computes by itself."""
    parameters = [function.args, function.keywords] if isinstance(function, partial) else []
    function = getattr(function, "func", function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if ast.get_docstring(tree.body[0]):
        del tree.body[0].body[0]
    source = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return json.loads(json.dumps({"name": function.__qualname__, "source": source, "parameters": parameters}))


def path_of_kept(cell: Cell, folder: Path) -> Path:
    """Return the file that has, or will have, the numbers of a cell."""
    return folder / f"{hash_of(cell.identity)}.json"


def kept(name: str, cell: Cell, folder: Path) -> dict:
    """The numbers of a cell: those in `folder`, or computed, and kept there with where and when that was."""
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


def restore(cells: dict[str, Cell], results: dict, folder: Path) -> None:
    """Keep in `folder` what results have of these cells, such as those of another machine.

    Their numbers are taken where the hash is the same: not after a change of all that they depend on.
    """
    for name, cell in cells.items():
        path, numbers = path_of_kept(cell, folder), results["cells"].get(name, {})
        if numbers.get("hash") == path.stem and not path.exists():
            write_json(path, {"name": name, **cell.identity, "numbers": numbers})


def stages(config, budgets: Sequence[int], budget: int) -> list:
    """Configs of the runs that lead to `budget` steps: stretches of a trunk of a constant rate, then a decayed branch.

    Equal in bits on a CPU to one run of `budget` steps with the trunk's warm-up. The trunk ends a stretch at each
    branching point, so that a short budget does not wait for a long one. The share `optim.decay` of a budget decays.
    """
    warmup, point, found = round(config.optim.warmup * max(budgets)), 0, []
    for steps in sorted(b for b in budgets if b <= budget):
        stretch, before = config.copy_and_resolve_references(), point
        point = steps - round(config.optim.decay * steps)
        stretch.steps = point
        # its warm-up is over before the first branch
        stretch.optim.update(schedule="constant", warmup=0.0 if before else warmup / point)
        found.append(stretch)
    branch = config.copy_and_resolve_references()
    branch.steps, branch.optim.warmup = budget, 0.0
    return [*found, branch]


def trained(configs: Sequence, folder: Path):
    """(model, params, workdirs) of runs each of which branches from the end of the one before.

    Workdirs stay in `folder`, by the hash of all that led there, so that runs share trunks; each resumes.
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
    model, _ = rwkv_jax.load(workdirs[-1])
    return model, state.params, workdirs


def curve(workdirs: Sequence[Path], points: int = 40) -> dict:
    """Training loss along runs that follow one another, in at most `points` points, each a mean of logged steps; and
    the held-out loss of every evaluation."""
    rows = [row for workdir in workdirs for row in metrics.logged(workdir / "metrics.jsonl")]
    logged = [row for row in rows if "loss_nats" in row]
    groups = [[logged[i] for i in group] for group in np.array_split(np.arange(len(logged)), min(points, len(logged)))]
    mean = lambda group: round(float(np.mean([row["loss_nats"] for row in group])), 5)
    found = {"tokens": [group[-1]["tokens"] for group in groups], "loss_nats": list(map(mean, groups))}
    judged = [row for row in rows if "valid_loss_nats" in row]
    if judged:
        found["evaluated_steps"] = [row["step"] for row in judged]
        found["valid_loss_nats"] = [round(row["valid_loss_nats"], 5) for row in judged]
    return found
