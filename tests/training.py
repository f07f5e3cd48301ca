"""Runs of training for tests: a config, a text, and a toy step that compiles quickly.

The toy has parameters, a moment, and a carry for each row, all functions of every batch and learning rate so far: a
bit-equal final state has seen the same steps. Strategies, loop, log and checkpoints around it are the real ones.
"""

import functools
import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import train
from rwkv_jax.train import assemble, metrics, run_config

STEPS = 6
WIDTH = 16_384  # numbers in the toy's parameters: a checkpoint that takes some room, and does not compress
NOISE = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)


class DiedError(Exception):
    """Raised in place of a kill of the process."""


def write_text(path):
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n)).decode() for n in rng.integers(2, 9, 200)]
    path.write_text(" ".join(rng.choice(words, 4000)))
    return str(path)


FIELDS = {
    "model.num_layers": 2, "model.dim": 32, "steps": STEPS, "seq_len": 16, "batch_size": 4,
    "log_every": 1, "eval_every": 3, "eval_tokens": 256, "save_every": 2,
}  # fmt: skip


def config(text, **changes):
    made = run_config.default()
    made.update_from_flattened_dict(FIELDS | {"corpus": text})
    made.update(changes)
    return made


def arguments(text, workdir, **changes):
    """The run of `config`, as arguments of the command line."""
    fields = FIELDS | {"corpus": text} | changes
    return [
        "--config=configs/tiny.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())
    ]  # fmt: skip


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b)))


def numbers(workdir):
    """Rows of the log without those of starts, and without fields that depend on the clock."""
    clock = re.compile("goodput|mfu|.*_seconds?|.*_per_second.*")
    rows = [row for row in metrics.logged(workdir / "metrics.jsonl") if "began" not in row]
    return [{k: v for k, v in row.items() if not clock.fullmatch(k)} for row in rows]


def losses(workdir, name="loss_nats"):
    """{step: loss} of the log."""
    return {row["step"]: row[name] for row in metrics.logged(workdir / "metrics.jsonl") if name in row}


def die_before(patch, doomed):
    """Make a run die instead of logging a row for which `doomed(row)` holds."""
    append = metrics.append

    def dies(path, row):
        if doomed(row):
            raise DiedError
        append(path, row)

    patch.setattr(metrics, "append", dies)


# ------------------------------------------------------------------------------------------ the toy


def toy_init(model, tx, method=None, carry_rows=None):
    def init(key):
        w = NOISE + jax.random.key_data(key)[-1].astype(jnp.float32)
        zero = jnp.zeros((), jnp.int32)
        carry = None if carry_rows is None else (jnp.zeros((carry_rows, 2)),)
        return train.TrainState(zero, {"w": w}, ({"m": jnp.zeros(WIDTH)},), zero, carry=carry)

    return init


def toy_step(model, tx, **options):
    def step(state, batch, lr, axis_name=None):
        mean = batch["tokens"][:, 1:].astype(jnp.float32).mean() / 256  # 2^n small integers: exact in any order
        mean = mean if axis_name is None else jax.lax.pmean(mean, axis_name)
        (moments,) = state.opt_state
        m = 0.5 * moments["m"] + mean
        w = 0.9 * state.params["w"] + lr * m
        carry = jax.tree.map(lambda x: 0.5 * x + batch["tokens"][:, :2], state.carry)
        values = {"loss_nats": w[0] + mean, "grad_norm": mean, "skipped": state.skipped, "targets": 1}
        state = state.replace(step=state.step + 1, params={"w": w}, opt_state=({"m": m},), carry=carry)
        return state, values

    return step


def toy_diagnose(model, tx, **options):
    def diagnose(state, batch, lr, axis_name=None):
        return state, {"k_max": jnp.arange(2.0) + state.step, "parameter_norm": {"emb": 1.0, "time_mix": 2.0}}

    return diagnose


def toy_windows(model, params, tokens, seq_len, batch_size, state=None):
    nats_N = np.asarray(params["w"])[0] + np.arange(len(tokens), dtype=np.float32)
    return np.where(np.arange(len(tokens)) == 0, np.nan, nats_N)


def install_toy(patch):
    """Makes runs train the toy instead of the model of their config."""
    patch.setattr(assemble, "make_init", toy_init)
    patch.setattr(assemble, "make_step", toy_step)
    patch.setattr(assemble, "make_diagnose", toy_diagnose)
    patch.setattr(assemble, "_programs", functools.cache(assemble._programs.__wrapped__))
    patch.setattr(train.loop.evaluate, "windows", toy_windows)


class Runs(NamedTuple):
    """An undisturbed run, and the workdir of one that died after its step 4 was saved."""

    whole: object
    state: train.TrainState
    half: object


def make_runs(text, folder) -> Runs:
    state = train.run(config(text), folder / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DiedError):
        die_before(patch, lambda row: row["step"] == 5)
        train.run(config(text), folder / "half")
    return Runs(folder / "whole", jax.device_get(state), folder / "half")


def copied(workdir, to):
    shutil.copytree(workdir, to)
    return to
