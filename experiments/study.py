"""Studies: train the arms of an experiment in pairs, cache each run, and compare the arms with intervals.

    study.main(base={...}, arms={"no shift of v": {...}}, seeds=3, measure="bits_per_byte", against="base")

is a whole script. Its docstring describes the study: the claim, the paper's number, and which results would reproduce
or contradict it.

    python -m experiments.NAME.run                    a draft: results.json and figure.png next to the script
    ... --publish                                     results for the ledger, which ignores drafts
    ... --arm=NAME --seed=1 --steps=50                some of the runs, or shorter ones
    ... --preset=gpu                                  another size -> gpu.json
    ... --kept                                        with budgets: results of the finished runs only
    ... --resume                                      reuse the published runs, run what they lack
    ... --sweep                                       learning rates of each arm -> sweep.json
    ... --smoke                                       seconds, to check that it runs; nothing is kept

The runs of a pair share the seed, the batches, and the initial values of all parameters that both models have. Each
run is cached in runs/studies/HASH.json, under a hash of everything its numbers depend on: config, corpus, measure and
`runs.CODE`. The same command therefore resumes after a kill, and a new arm or seed costs only its own runs. A fresh
clone has no cached runs, but published results contain their hashes and numbers: `--resume` reuses these.
"""

import argparse
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from experiments import command, ledger, measures, stamp, statistics, sweeps
from experiments.results import draw, write_json
from experiments.runs import CODE, Cell, curve, fixed, flat, identity_of, kept, path_of_kept, restore, stages, trained
from rwkv_jax import data, files, hardware, train
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import read_json, user_path
from rwkv_jax.models.block import check_choice
from rwkv_jax.train import optim, run_config

RUNS = Path(__file__).parents[1] / "runs" / "studies"
SMOKE = {
    "base": {"model.num_layers": 1, "model.dim": 16, "seq_len": 16, "batch_size": 2, "steps": 4},
    "seeds": 2,
    "held_out": 2**10,
}

# Arms of all experiments that compare architectures.
MODELS = {
    **{name: {"model": {"name": name}} for name in ("rwkv4", "rwkv5", "rwkv6", "rwkv7")},
    "transformer": {"model": {"name": "transformer"}},
    "transformer+shift": {"model": {"name": "transformer", "variant": {"token_shift": True}}},  # RWKV's token shift
    "lstm": {"model": {"name": "lstm"}},
    "hybrid": {"model": {"name": "rwkv4", "layers": ("rwkv4", "attention")}},  # alternating
}


class Sweep(NamedTuple):
    """A search for each arm's learning rate: factors of 2 around the base's, extended while the best is at an end."""

    field: str = "optim.lr"
    name: Callable = str  # an arm's name in sweep.json; arms with the same name share a rate
    value: Callable = itemgetter("valid_bits_per_byte")  # the number of a run to compare
    better: Callable = min
    known: Path | None = None  # another sweep, whose arms are not searched: the study takes their rates from there
    changes: Mapping = MappingProxyType({})  # overrides of the base while sweeping, such as fewer steps
    widest: int | None = None  # maximum number of rates


@dataclass(frozen=True)
class Study:
    """Fields of a study, the arguments of `main`. Fields of configs are nested or dotted: {"model": {"dim": 64}} or
    {"model.dim": 64}.

    Args:
        base: overrides of `run_config.default()`; "tokens" may replace "steps".
        arms: overrides of the base by arm, or a function of the base's config that returns them, or a list of
            overrides, one per stage: each stage branches from the end of the previous one.
        seeds: the number of seeds, or the seeds.
        is_pooled: whether intervals and p over seeds take the spread of all arms together (`statistics.pooled`), and
            where there is one seed that of the largest budget with more. For arms that spread alike, and too few seeds
            to tell: the 95 % of two pairs reach nine standard deviations to either side.
        measure: the name of a function in `measures`, any other function (model, params, corpus) -> numbers, or
            several of them. Arms are compared by the number with the first one's name; with `run`, the name of a
            number is enough.
        against: the arm that others are compared with; "base", without overrides, need not be listed in `arms`.
        budgets: several lengths of the same run, in steps; each is decayed and branches from one trunk.
        budgets_of: (arm, seed) -> the budgets to run; None: all.
        held_out: maximum number of validation tokens and of test tokens to measure.
        swept: whether each arm takes its best learning rate from the sweep.json next to the script. Missing rates are
            searched first.
        prepare: (config, folder) -> None, completes the config of a run with files that must be made first, such as a
            vocabulary or initial weights. The folder is kept.
        run: (config, folder) -> numbers, instead of training on a corpus; `base` then has its own fields.
        also: (options) -> {name: function (config of the base, folder) -> numbers}: numbers besides the runs.
        options: flags of the command and their help: each sets the base's field of that name, or else an argument of
            `also`.
        conclude: (study, values by name) -> JSON object with "ledger", and "not_run", as in `experiments.command`.
        presets: overrides of these fields by preset. Arms may be given by name there.
    """

    base: dict
    arms: dict = field(default_factory=dict)
    seeds: Any = 1
    is_pooled: bool = False
    measure: Any = "bits_per_byte"
    against: str | None = "base"
    budgets: Sequence[int] = ()
    budgets_of: Callable | None = None
    held_out: int = 2**17
    swept: bool = False
    sweep: Sweep = field(default_factory=Sweep)
    prepare: Callable | None = None
    run: Callable | None = None
    also: Callable = dict
    options: dict = field(default_factory=dict)
    conclude: Callable | None = None
    presets: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- runs


def size_of(study: Study) -> str:
    """Return layers and width of the base, such as "4 x 128"."""
    base = flat(study.base)
    return f"{base['model.num_layers']} x {base['model.dim']}"


def config_of(study: Study, changes: dict | None = None, seed: int = 0):
    """Return the config of the base with the changes of an arm."""
    fields = flat(study.base) | flat(changes or {})
    if study.run:
        return ConfigDict(unflatten_dict(fields | {"seed": seed}, sep="."))
    config, tokens = run_config.default().lock(), fields.pop("tokens", 0)
    config.update(eval_every=0, eval_tokens=0, save_every=0, seed=seed)
    if unknown := sorted(fields.keys() - flat(config.to_dict()).keys()):
        raise ValueError(f"no config field {unknown[0]!r}; rwkv_jax/train/run_config.py lists them")
    try:
        config.update_from_flattened_dict(fields)
    except TypeError as error:
        raise ValueError(f"a config field has the wrong type: {error}") from None
    if "steps" not in fields and tokens:
        config.steps = max(1, tokens // (config.seq_len * config.batch_size))
    if "log_every" not in fields:
        config.log_every = max(1, config.steps // 100)
    return config


def arms_of(study: Study) -> dict:
    """Return {arm: overrides of each of its stages}. Most arms have one stage."""
    implied = {"base": {}} if study.against == "base" else {}
    found = {}
    for arm, changes in (implied | study.arms).items():
        changes = changes(config_of(study)) if callable(changes) else changes
        found[arm] = list(changes) if isinstance(changes, list | tuple) else [changes]
    return found


def seeds_of(study: Study) -> tuple[int, ...]:
    return tuple(range(study.seeds)) if isinstance(study.seeds, int) else tuple(study.seeds)


def name_of(arm: str, seed: int, budget: int | None = None) -> str:
    return f"{arm}, seed {seed}" + (f", {budget} steps" if budget else "")


def measured(study: Study, configs: Sequence, folder: Path) -> dict:
    """Train a run; return what results keep: the numbers of its measures, its curve and its size."""
    model, params, workdirs = trained(configs, folder)
    config, corpus, numbers = configs[-1], measures.held_out(configs[-1], study.held_out), {}
    for measure in measures_of(study).values():
        numbers |= measure(model, params, corpus)
    return numbers | {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flops_per_token": hardware.flops_per_token(model, config.seq_len),
        "tokens": config.steps * config.batch_size * config.seq_len,
        "lr": train.learning_rate(config, model)(config.steps // 2),
        "corpus_sha256": corpus_of(config),
        "curve": curve(workdirs),
    }


def measures_of(study: Study) -> dict[str, Callable]:
    """Return the study's measures by name. Arms are compared by the first."""
    found = [study.measure] if isinstance(study.measure, str | Callable) else study.measure or ()
    name = lambda measure: measure if isinstance(measure, str) else getattr(measure, "func", measure).__name__
    return {name(m): getattr(measures, m, None) if isinstance(m, str) else m for m in found}


def cell_of(study: Study, configs: Sequence, folder: Path) -> Cell:
    """Return the cell of one run, after preparing its weights and vocabulary."""
    for config in configs if study.prepare else ():
        study.prepare(config, folder)
    identity = {"config": [fixed(config) for config in configs], "code": CODE, "corpus": corpus_of(configs[-1])}
    if study.run:
        return Cell(identity | {"run": identity_of(study.run)}, partial(study.run, configs[-1], folder))
    for config in configs:
        if not config.finetune.model:  # else the weights decide its fields
            run_config.model_of(config)  # a wrong arm fails before the first one is trained
    identity["measure"] = [identity_of(measure) for measure in measures_of(study).values()]
    return Cell(identity | {"held_out": study.held_out}, partial(measured, study, configs, folder))


def corpus_of(config) -> str | None:
    """Return the SHA-256 of the corpus that a config names; None if it names none."""
    return data.prepare(config.corpus, config.get("tokenizer", "bytes")).sha256 if config.get("corpus") else None


def cells(study: Study, folder: Path, sweep: Path | None = None, **options) -> dict[str, Cell]:
    """Return the cells of all runs by name, small budgets and first seeds first, then the cells of `also`."""
    found, arms = {}, arms_of(study)
    rates = {arm: {study.sweep.field: swept_lr(study, arm, sweep, folder)} for arm in arms if study.swept}
    for budget, seed, arm in itertools.product(study.budgets or (None,), seeds_of(study), arms):
        if not (budget and study.budgets_of) or budget in study.budgets_of(arm, seed):
            configs = [config_of(study, rates.get(arm, {}) | flat(changes), seed) for changes in arms[arm]]
            configs = stages(configs[-1], study.budgets, budget) if budget else configs
            found[name_of(arm, seed, budget)] = cell_of(study, configs, folder)
    for name, function in study.also(**options).items():
        config = config_of(study)
        identity = {"function": identity_of(function), "config": fixed(config), "corpus": corpus_of(config)}
        found[name] = Cell(identity | {"code": CODE}, partial(function, config, folder))
    return found


# ------------------------------------------------------------------------------------------ learning rates


def swept_lr(study: Study, arm: str, path: Path, folder: Path) -> float:
    """Return the best learning rate of an arm at the study's size, from the sweep at `path`.

    If it lacks the arm, and the sweep that the study knows too, search with the first seed and the smallest budget.
    """
    its, changes = study.sweep, flat(arms_of(study)[arm][-1])
    base = config_of(study, changes)
    name = f"{its.name(arm)} {base.model.num_layers}x{base.model.dim}"
    if its.known and (found := sweeps.best(its.known, name)):
        return found
    centre = flat(base.to_dict()).get(its.field)
    centre = centre or optim.default_lr(run_config.model_of(base).layers[0], base.model.dim)

    def number_at(lr: float) -> float:
        config = config_of(study, changes | flat(dict(its.changes)) | {its.field: lr})
        configs = stages(config, study.budgets, study.budgets[0]) if study.budgets else [config]
        return its.value(kept(f"{arm}, lr {lr:g}", cell_of(study, configs, folder), folder))

    used = base.to_dict() | flat(dict(its.changes)) | ({"steps": study.budgets[0]} if study.budgets else {})
    about = {name: used[name] for name in ("steps", "corpus") if used.get(name)}
    sweeps.bracket(path, name, centre, number_at, its.better, its.widest, **about)
    return sweeps.best(path, name, its.better)


# ------------------------------------------------------------------------------------------- comparison


def runs_of(study: Study, values: dict, arm: str, budget: int | None = None) -> list[dict]:
    """Return the numbers of an arm's runs at a budget, one per seed."""
    names = (name_of(arm, seed, budget) for seed in seeds_of(study))
    return [values[name] for name in names if name in values]


def budgets_done(study: Study, values: dict) -> list[int]:
    """Return the budgets for which some arm has a run."""
    return [budget for budget in study.budgets if any(runs_of(study, values, arm, budget) for arm in arms_of(study))]


def compared(study: Study, values: dict, number: str | None = None, budget=None) -> dict:
    """Return, by arm, the mean over seeds of a number, and its paired difference from the study's arm `against`.

    The 95 % interval is the wider of Student's t over seeds and a bootstrap over documents. `p` is Student's, `p_holm`
    is corrected for the number of arms, and `resolved` is true if `p_holm` is below 0.05 and the interval excludes 0.
    """
    number, against = number or next(iter(measures_of(study))), study.against
    budget = budget or (max(budgets_done(study, values)) if study.budgets else None)
    rows = {}
    for arm in arms_of(study):
        if runs := runs_of(study, values, arm, budget):
            rows[arm] = {name: runs[0][name] for name in ("parameters", "flops_per_token", "lr") if name in runs[0]}
            rows[arm][number] = float(np.mean([run[number] for run in runs]))
            if against and arm != against:
                rows[arm] |= paired(study, values, arm, against, number, budget)
    changed = [row for row in rows.values() if row.get("p") is not None]
    for row, p in zip(changed, statistics.holm([row["p"] for row in changed]), strict=True):
        row |= {"p_holm": p, "resolved": p < 0.05 and not row["low"] <= 0 <= row["high"]}
    return rows


def paired(study: Study, values: dict, arm: str, against: str, number: str | None = None, budget=None) -> dict:
    """Return the paired difference of two arms over their common seeds, as in `compared`; {} if there are none."""
    number = number or next(iter(measures_of(study)))
    of_seed = lambda arm, seed: values.get(name_of(arm, seed, budget))
    seeds = [seed for seed in seeds_of(study) if of_seed(arm, seed) and of_seed(against, seed)]
    if not seeds:
        return {}
    runs, others = ([of_seed(name, seed) for seed in seeds] for name in (arm, against))
    of = lambda of_runs, name: np.array([run[name] for run in of_runs])
    by_seed = of(runs, number) - of(others, number)
    spread = spread_of(study, values, number, budget)
    mean, *interval = statistics.t_interval(by_seed, spread)
    if f"{number}_nats" in runs[0]:
        nats_SD = of(runs, f"{number}_nats") - of(others, f"{number}_nats")
        interval = statistics.wider(interval, statistics.over_documents(nats_SD, runs[0][f"{number}_bytes"]))
    found = {"difference": mean, "low": interval[0], "high": interval[1], "p": statistics.p_value(by_seed, spread)}
    known = {name: None if np.isnan(x) else float(x) for name, x in found.items()}
    return known | {"by_seed": by_seed.round(5).tolist(), "seeds": len(runs)}


def spread_of(study: Study, values: dict, number: str, budget=None) -> statistics.Spread | None:
    """Return the spread of a number's paired differences over seeds, from the arms that have all seeds at a budget.

    If fewer than two have, it is that of the largest budget where two do; None if there is none, or if the study is
    not pooled.
    """
    for of_budget in (budget, *sorted(study.budgets, reverse=True)) if study.is_pooled else ():
        runs_AS = [runs_of(study, values, arm, of_budget) for arm in arms_of(study)]
        complete = [[run[number] for run in runs_S] for runs_S in runs_AS if len(runs_S) == len(seeds_of(study))]
        if complete and (spread := statistics.pooled(complete)):
            return spread
    return None


def table(study: Study, rows: dict) -> str:
    """Return the comparison as text, one line per arm, largest difference first."""
    number = next(iter(measures_of(study)))
    lines = [("", number, f"minus {study.against}", "95 %", "p (Holm)")]
    for arm, row in sorted(rows.items(), key=lambda item: -item[1].get("difference", np.inf)):
        known = row.get("low") is not None
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]" if known else ""
        p = f"{row['p_holm']:.3f}{'*' * row['resolved']}" if "p_holm" in row else ""
        difference = f"{row['difference']:+.4f}" if "difference" in row else ""
        lines.append((arm, f"{row[number]:.4f}", difference, interval, p))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def fields_of(study: Study) -> dict:
    """Return the fields of a study that results keep; `Study(**fields)` suffices for `conclude`."""
    kept = {name: getattr(study, name) for name in ("seeds", "is_pooled", "budgets", "against", "held_out")}
    return {"base": flat(study.base), "arms": arms_of(study), "measure": list(measures_of(study)), **kept}


# ------------------------------------------------------------------------------------------- the command


def main(**fields) -> None:
    """Run the command line of the calling script, whose docstring describes the study. Takes the fields of `Study`."""
    caller = inspect.currentframe().f_back.f_globals
    script, doc = Path(caller["__file__"]).absolute(), inspect.cleandoc(caller["__doc__"] or "A study.")
    run = reported(command.STOPPED)(lambda _: _main(script, doc, Study(**fields)))
    if code := run():
        end(code)


def _main(script: Path, doc: str, study: Study) -> None:
    args = vars(_parser(doc, study).parse_args())
    is_smoke, label = args["smoke"], "smoke" if args["smoke"] else args["preset"]
    study = chosen(study, label, args["arm"], args["seed"], args["steps"], args["text"])
    options = {name: args[name] for name in study.options if name not in study.base}
    given = {name: args[name] for name in study.options if name in study.base and args[name]}
    study = replace(study, base=study.base | given)
    is_part = any(args[name] for name in ("arm", "seed", "steps"))
    if is_part:
        # `conclude` may need runs that were left out, and nothing else reads the numbers of `also`
        study = replace(study, conclude=None, also=lambda **_: {})
    if args["publish"] and (study.conclude is None or is_smoke):
        raise ValueError(
            "only a whole study with `conclude` can be published, without --arm, --seed, --steps, --smoke"
        )
    if args["kept"] and (args["sweep"] or not study.budgets):
        raise ValueError("--kept is for studies with budgets, and excludes --sweep")
    if args["resume"] and (args["sweep"] or is_smoke):
        raise ValueError("--resume is for the runs of published results, and excludes --sweep and --smoke")
    if unknown := [name for name, measure in measures_of(study).items() if not (measure or study.run)]:
        raise ValueError(
            f"no measure {unknown[0]!r} in experiments/measures.py, expected a name from there or a function"
        )
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(elsewhere) if is_smoke else RUNS
        out = args["out"] or (folder if is_smoke else script.parent)
        files.check_output_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        if args["sweep"]:
            for arm in arms_of(study):
                print(f"{arm}: {swept_lr(study, arm, out / 'sweep.json', folder):g} is best")
            return
        asked = cells(study, folder, script.with_name("sweep.json"), **options)
        if args["resume"]:
            same = restore(asked, read_json(path_of(script, label, publish=True)), folder)
            print(f"resumed: {same} of {len(asked)} are published", file=sys.stderr)
        missing = []
        if args["kept"]:
            missing = [name for name, its in asked.items() if not path_of_kept(its, folder).exists()]
            if not asked.keys() - study.also(**options).keys() - set(missing):
                raise ValueError(f"no run of this study is in {folder}: --kept needs at least one finished run")
        values = {name: kept(name, cell, folder) for name, cell in asked.items() if name not in missing}
        results = concluded(study, label, values) | {"missing": missing} | ({} if args["publish"] else {"draft": True})
        path = path_of(out / script.name, label, args["publish"])
        write_json(path, results | {"stamp": stamp.stamp()})
        if not (is_part and script.with_name("plot.py").exists()):  # which draws what `conclude` adds
            draw(script.parent.name if script.parents[1] == ledger.HERE else "", path)
    if study.measure:
        print(table(study, results["table"]))
    for row in results.get("ledger", ()):
        print("{artefact}: {ours} (paper: {paper}): {verdict}".format(**row))
    if args["publish"] and out.resolve().parent == ledger.HERE.resolve():
        ledger.refresh()
    print(f"written: {path}" if path.exists() else "the smoke run passed; nothing was written")


def _parser(doc: str, study: Study) -> Parser:
    head, _, rest = doc.partition("\n\n")
    parser = Parser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ["cpu", *(name for name in study.presets if name != "smoke")]
    parser.add_argument("--preset", choices=presets, default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds, to check that it runs")
    parser.add_argument("--kept", action="store_true", help="write results of the finished runs only")
    parser.add_argument("--resume", action="store_true", help="reuse the runs of the published results")
    parser.add_argument("--sweep", action="store_true", help="search learning rates instead -> sweep.json")
    parser.add_argument("--publish", action="store_true", help="write results for the ledger, which ignores drafts")
    parser.add_argument("--arm", action="append", help="only this arm and the one it is compared with; repeatable")
    parser.add_argument("--seed", action="append", type=int, help="only this seed; repeatable")
    parser.add_argument("--steps", type=int, help="number of steps of every run")
    parser.add_argument("--text", help="another corpus, such as enwik8, a text file or a folder")
    parser.add_argument("--out", type=user_path, help="output folder")
    for option, about in study.options.items():
        parser.add_argument(f"--{option}", help=about)
    return parser


def chosen(study: Study, preset: str = "cpu", arms=None, seeds=None, steps=None, text=None) -> Study:
    """Return the study at a preset's size, restricted to what the command line asks for."""
    smoke = [SMOKE] if preset == "smoke" and study.run is None else []
    for changes in (*smoke, study.presets.get(preset, {})):
        changes = dict(changes, base=flat(study.base) | flat(changes.get("base", {})))
        if not isinstance(changes.get("arms", {}), dict):  # names
            changes["arms"] = {arm: study.arms[arm] for arm in changes["arms"]}
        study = replace(study, **changes)
    if steps is not None and steps < 1:
        raise ValueError(f"--steps={steps}, expected 1 or more")
    wanted = {name: value for name, value in (("steps", steps), ("corpus", text)) if value is not None}
    if study.run and (unknown := wanted.keys() - flat(study.base).keys()):
        raise ValueError(f"the base of this study has no {min(unknown)!r}")
    study = replace(study, base=flat(study.base) | wanted)
    study = replace(study, budgets=() if steps else study.budgets)
    if study.against is not None:
        check_choice("arm in against", study.against, arms_of(study))
    if unknown := set(arms or ()) - set(arms_of(study)):
        raise ValueError(f"no arm {min(unknown)!r}, expected one of {', '.join(arms_of(study))}")
    if arms:
        study = replace(study, arms={arm: x for arm, x in study.arms.items() if arm in (*arms, study.against)})
    if preset == "smoke":
        study = replace(study, swept=False)
    return replace(study, seeds=tuple(seeds)) if seeds else study


def concluded(study: Study, preset: str, values: dict) -> dict:
    """Return the results, from the numbers of all runs."""
    results = {"preset": preset, "study": fields_of(study)}
    if study.measure:
        results["table"] = compared(study, values)
    if study.measure and study.budgets:
        done = budgets_done(study, values)
        results["by_budget"] = {str(budget): compared(study, values, budget=budget) for budget in done}
    if study.conclude:
        results |= study.conclude(study, command.bare(values))
    assert all(row["verdict"] in command.VERDICTS for row in results.get("ledger", ()))
    return results | {"cells": values, "wall_seconds": sum(cell["wall_seconds"] for cell in values.values())}


def path_of(script: Path, preset: str, publish: bool) -> Path:
    """Return the file to write results to: a draft never replaces published results."""
    size = [] if preset in ("cpu", "smoke") else [preset]
    stem = "-".join(size or ["results"] if script.stem == "run" else [script.stem, *size])
    path = script.with_name(f"{stem}.json")
    is_published = path.exists() and not read_json(path).get("draft")
    return path.with_name(f"{stem}-draft.json") if is_published and not publish else path
