"""Our optimiser steps against those of the released trainer, one by one, in float64.

Claim: from the same tensors, on the same batches, losses, gradient norms and final tensors of our training step equal
those of BlinkDL's own `RWKV-v4neo/src/model.py`, up to rounding. One run covers initial state, equations, WKV's
backward pass, L2Wrap, learning-rate groups, clipping and Adam: without one of them the curves diverge, as the rows
named "without" show.

    python -m experiments.trajectory.run                      against the kept trajectories of the released code
    python -m experiments.trajectory.run --rwkv-lm=CLONE      and RWKV-4 against a clone of BlinkDL/RWKV-LM, run here

The kept trajectories are tests/goldens/official_trajectory*.npz, of RWKV-4, 5.2, 6 and 7: V 64, L 3, D 32 or 64, 4
rows of 48 tokens, with the optimisers of `RECIPES`, the released groups and clip 1.0. Their losses are the cross
entropy before each step, their gradient norms those before clipping, their final tensors float32. A clone needs torch
(requirements-live.txt), no GPU: see released.py.

Cost: three minutes on 2 CPU cores.

  reproduced     every loss within 1e-6 nats, every gradient norm within 1e-6 of its own size, every number of the
                 final tensors within 1e-6, against the kept trajectories and the clone, if one is given
  contradicted   anything else

Deviations: tiny shapes, one seed; float64 where the released models trained in bfloat16.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command
from experiments.statistics import at_most
from experiments.trajectory import released
from rwkv_jax import train
from rwkv_jax.command import end
from rwkv_jax.interop import official
from rwkv_jax.train import optim

HERE = Path(__file__).parent
GOLDENS = HERE.parents[1] / "tests" / "goldens"
WITHIN = 1e-6
RECIPES = {  # of the released trainers: learning rate, and optimiser fields that differ from the defaults
    "rwkv4": (3e-3, {}),
    "rwkv5": (1e-3, {}),
    "rwkv6": (1e-3, {"weight_decay": 0.1}),
    "rwkv7": (1e-3, {"weight_decay": 0.1, "eps": 1e-18}),
}
CELLS = {
    "float64": {},
    "RWKV-5.2, float64": {"version": "rwkv5"},
    "RWKV-6, float64": {"version": "rwkv6"},
    "RWKV-7, float64": {"version": "rwkv7"},
    "float32": {"dtype": "float32"},
    "without L2Wrap": {"l2wrap": False},
    "without learning-rate groups": {"groups": ()},
}
VERSIONS = {name: its.get("version", "rwkv4") for name, its in CELLS.items() if name.endswith("float64")}


@dataclass(frozen=True)
class Preset:
    steps: int = 150
    compared: tuple = tuple(CELLS)


PRESETS = {"smoke": Preset(steps=4, compared=("float64", "without L2Wrap")), "cpu": Preset()}


def golden(version="rwkv4") -> dict:
    """Return the arrays of the released trainer: initial and final tensors, batches, losses, gradient norms."""
    with np.load(GOLDENS / f"official_trajectory{'' if version == 'rwkv4' else version[-1]}.npz") as arrays:
        return dict(arrays)


def start(arrays) -> dict:
    """Return the initial tensors under their released names, as float64."""
    return {k.removeprefix("init/"): x.astype(np.float64) for k, x in arrays.items() if k.startswith("init/")}


def ours(steps, version="rwkv4", dtype="float64", l2wrap=True, groups=None):
    """Return (losses, gradient norms, final tensors under their released names) of our step on the kept batches."""
    arrays, (lr, recipe) = golden(version), RECIPES[version]
    with jax.enable_x64(dtype == "float64"):
        model, params = official.from_official(start(arrays), dtype=dtype)
        tx, zero = optim.optimiser(groups=groups, **recipe), jnp.zeros((), jnp.int32)
        state = train.TrainState(zero, params, tx.init(params), zero)
        step = jax.jit(train.make_step(model, tx, l2wrap=l2wrap))
        losses, norms = [], []
        for tokens_BT in arrays["tokens"][:steps].astype(np.int32):
            batch = {"tokens": tokens_BT, "mask": np.ones_like(tokens_BT[:, 1:], bool)}
            state, values = step(state, batch, np.dtype(dtype).type(lr))
            losses.append(float(values["loss_nats"]))
            norms.append(float(values["grad_norm"]))
        return np.array(losses), np.array(norms), official.to_official(state.params)


def kept(steps, version="rwkv4"):
    """Return the same of the released trainer; it kept final tensors only after its last step."""
    arrays = golden(version)
    final = {k.removeprefix("final/"): x for k, x in arrays.items() if k.startswith("final/")}
    return arrays["losses"][:steps], arrays["grad_norms"][:steps], final if steps == len(arrays["losses"]) else None


def apart(a, b) -> dict:
    """Return the distance between two trajectories: by step, and at most."""
    (losses, norms, tensors), (their_losses, their_norms, their_tensors) = a, b
    loss = np.abs(losses - their_losses)
    norm = np.abs(norms / their_norms - 1)
    found = {"loss_nats": loss.max(), "grad_norm_relative": norm.max()}
    if tensors and their_tensors:
        found["final_tensors"] = max(np.abs(x - their_tensors[name]).max() for name, x in tensors.items())
    return {k: float(v) for k, v in found.items()} | {"loss_by_step": [float(f"{x:.3g}") for x in loss]}


def cells(preset, workdir, rwkv_lm):
    steps = preset.steps

    def against_kept(name):
        found, version = ours(steps, **CELLS[name]), CELLS[name].get("version", "rwkv4")
        return {"losses": rounded(found[0]), "from kept": apart(found, kept(steps, version))}

    asked = {name: partial(against_kept, name) for name in preset.compared}
    if rwkv_lm:
        path = released.source(rwkv_lm)

        def clone():
            arrays = golden()
            theirs = released.trajectory(path, start(arrays), arrays["tokens"][:steps], RECIPES["rwkv4"][0])
            both = {"from clone": apart(ours(steps), theirs), "clone from kept": apart(theirs, kept(steps))}
            return {"losses": rounded(theirs[0])} | both

        asked[f"clone, model.py {released.digest(path)}"] = clone
    return asked


def conclude(preset, values):
    clones = [name for name in values if name.startswith("clone")]
    rows = [_row(preset, name, values, clones if name == "float64" else ()) for name in VERSIONS if name in values]
    not_run = {
        "artefact": "The same against a clone of RWKV-LM",
        "command": "python -m experiments.trajectory.run --rwkv-lm=CLONE",
        "hardware": "2 CPU cores, torch",
        "hours": 0.02,
        "why": "a clone has to be given",
    }
    kept_losses = {
        name: rounded(kept(preset.steps, version)[0]) for name, version in VERSIONS.items() if name in values
    }
    return {"ledger": rows, "not_run": [] if clones else [not_run], "kept_losses": kept_losses}


def _row(preset, name, values, clones):
    judged = {"the kept trajectory": values[name]["from kept"]}
    judged |= {f"a clone run here ({clone.split()[-1]})": values[clone]["from clone"] for clone in clones}
    held = all(x <= WITHIN for its in judged.values() for k, x in its.items() if k != "loss_by_step")
    others = _others(preset, values) if name == "float64" else ""
    return {
        "artefact": f"The released trainer{'' if name == 'float64' else ' of ' + name.split(',')[0]}, step for step",
        "paper": f"{preset.steps} steps of its model.py, float64",
        "ours": f"losses within {at_most(judged['the kept trajectory']['loss_nats'])} nats",
        "details": "; ".join(f"from {source}: {_said(its)}" for source, its in judged.items()) + others,
        "verdict": "reproduced" if held else "contradicted",
    }


def rounded(losses) -> list[float]:
    return [round(float(x), 6) for x in losses]


def _said(its) -> str:
    said = (
        f"losses within {at_most(its['loss_nats'])} nats, gradient norms within {at_most(its['grad_norm_relative'])}"
    )
    return said + (f", final tensors within {at_most(its['final_tensors'])}" if "final_tensors" in its else "")


def _others(preset, values) -> str:
    others = [
        f"{name} {at_most(values[name]['from kept']['loss_nats'])}" for name in preset.compared if name not in VERSIONS
    ]
    return f" (largest difference of a loss: {', '.join(others)})"


def main(argv=None) -> int:
    options = {"rwkv-lm": "clone of BlinkDL/RWKV-LM, to run its model.py too"}
    return command.main(HERE, __doc__, PRESETS, cells, conclude, options=options, argv=argv)


if __name__ == "__main__":
    end(main())
