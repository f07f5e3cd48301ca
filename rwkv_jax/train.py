"""Training: the state, one step, one loop.

    python -m rwkv_jax.train --config=configs/tiny.py --workdir=runs/tiny [--config.optim.lr=6e-4 ...]

A workdir holds `config.json` (model, tokenizer, corpus hash, versions, the whole config), `metrics.jsonl` (one
object a log step) and `checkpoints/`. The same command again resumes it, bit for bit on a CPU or TPU.
"""

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from tqdm import tqdm

from rwkv_jax import (
    checkpoint,
    corpora,
    data,
    evaluate,
    hardware,
    metrics,
    models,
    optim,
    parallel,
    run_config,
    tokenizers,
)

# What may change between the runs of one workdir: nothing that training depends on (the strategy, with dropout, does:
# each device of pmap draws its own).
FREE_FIELDS = ("log_every", "eval_every", "eval_tokens", "save_every", "keep", "strategy")


class TrainState(struct.PyTreeNode):
    step: jax.Array  # steps taken, counting the skipped
    params: dict
    opt_state: tuple
    skipped: jax.Array  # steps whose loss or gradient was not finite: they changed nothing


def make_init(model, tx):
    """`init(key) -> TrainState`."""

    def init(key):
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero)

    return init


def make_step(model, tx, *, accumulation=1, seed=0, l2wrap=True):
    """`step(state, batch, lr, axis_name=None) -> (state, metrics)` on tokens [B, T+1] and a loss mask [B, T].

    Loss and gradient are sums, divided once by the number of masked-in targets of the whole step: over micro-batches
    and devices too, so that neither changes what a ragged mask means.
    """

    def objective(params, batch, key):
        tokens_BT, mask_BT = batch["tokens"], batch["mask"]
        rngs = {"dropout": key} if model.dropout else None
        logits_BTV, _ = model.apply({"params": params}, tokens_BT[:, :-1], rngs=rngs)
        nll_BT = jnp.where(mask_BT, optim.cross_entropy(logits_BTV, tokens_BT[:, 1:]), 0)
        penalty_BT = jnp.where(mask_BT, optim.l2wrap(logits_BTV), 0) if l2wrap else 0
        return (nll_BT + penalty_BT).sum(), (nll_BT.sum(), mask_BT.sum())

    gradient = jax.grad(objective, has_aux=True)

    def sums(params, batch, key):
        if accumulation == 1:
            return gradient(params, batch, key)
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total, i_and_batch):
            i, batch = i_and_batch
            return jax.tree.map(jnp.add, total, gradient(params, batch, jax.random.fold_in(key, i))), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro))[0]

    def step(state, batch, lr, axis_name=None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        totals = sums(state.params, batch, key)
        if axis_name is not None:
            totals = jax.lax.psum(totals, axis_name)
        grads, (nll, count) = totals
        grads = jax.tree.map(lambda g: g / count, grads)
        return apply_gradient(tx, state, grads, nll / count, lr)

    return step


def apply_gradient(tx, state, grads, loss, lr):
    """The state after a step along `grads`, unchanged where that or the loss is not finite, and the step's metrics."""
    grad_norm = optax.tree.norm(grads)
    direction, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, direction)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(direction))
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    values = {"loss_nats": loss, "grad_norm": grad_norm, "skipped": skipped}
    return TrainState(state.step + 1, params, opt_state, skipped), values


def run(config, workdir) -> TrainState:
    """Train to `config.steps`, resuming what `workdir` holds; SIGINT and SIGTERM save and return early."""
    if not str(workdir):
        raise ValueError("workdir is empty, expected a folder for the run")
    workdir = Path(workdir)
    run_config.check(config)
    fields = {k: v for k, v in config.model.to_dict().items() if not (k == "layers" and v is None)}
    model = models.build(**fields)
    parallel.check_divisible(config.batch_size, config.accumulation, config.strategy)
    lr = learning_rate(config, model)
    corpus = corpora.prepare(config.corpus, _tokenizer(config, workdir))
    if corpus.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size}, expected at least {corpus.vocab_size}, "
            f"the vocabulary of tokenizer {config.tokenizer!r}"
        )
    batches = data.dataset(corpus.train.tokens, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
    o = config.optim
    recipe = (tuple(o.betas), o.eps, o.weight_decay, o.clip, tuple(tuple(g) for g in o.groups))
    init, step, put = _programs(model, recipe, config.strategy, config.accumulation, config.seed, o.l2wrap)

    with claimed(workdir):
        _write_config(workdir, config, fields, corpus)
        state, start = _restore(workdir, config, init)
        with _stop_signals() as stop:
            return _loop(workdir, config, model, corpus, batches, lr, (step, put), state, start, stop)


@functools.cache
def _programs(model, recipe, strategy, accumulation, seed, l2wrap):
    """(init, step, put), compiled once a process: further runs of the same model start at once."""
    tx = optim.optimiser(*recipe)
    step = make_step(model, tx, accumulation=accumulation, seed=seed, l2wrap=l2wrap)
    return parallel.STRATEGIES[strategy](make_init(model, tx), step)


def learning_rate(config, model):
    """The schedule of a run: learning rate of each step."""
    o, steps = config.optim, config.steps
    lr = optim.default_lr(model.layers[0], model.dim) if o.lr is None else o.lr
    lr_end = lr / 10 if o.lr_end is None else o.lr_end
    warmup, decay_start = round(o.warmup * steps), steps - round(o.decay * steps)
    return optim.schedule(o.schedule, lr, lr_end, steps, warmup, decay_start)


def _loop(workdir, config, model, corpus, batches, lr, step_and_put, state, start, stop):
    step, put = step_and_put
    path, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    tokens_per_step = config.batch_size * config.seq_len
    devices = 1 if config.strategy == "single" else jax.device_count()
    peak = hardware.peak_flops(jax.devices()[0])
    flops = hardware.flops_per_token(model, config.seq_len)
    train_seconds = next((r["train_seconds"] for r in reversed(_rows(path)) if "train_seconds" in r), 0.0)
    seconds, timed = 0.0, 0  # since the last row, without compilation, evaluation and saving
    done = saved = start
    due = lambda every: every and done % every == 0

    def evaluate_step():
        held_out = corpus.valid.tokens[: config.eval_tokens]
        with parallel.beside_the_step(config.strategy):
            nll = evaluate.windows(model, state.params, held_out, config.seq_len, config.batch_size)
        losses = _losses(nll[1:].mean(), config)
        metrics.append(path, {"step": done} | {f"valid_{k}": v for k, v in losses.items()})

    to_evaluate = lambda: config.eval_tokens and (done == config.steps or due(config.eval_every))
    evaluated = {r["step"] for r in _rows(path) if "valid_loss_nats" in r}
    if start in checkpoint.steps(folder) and start not in evaluated and to_evaluate():
        evaluate_step()  # killed between saving this step and evaluating it

    with tqdm(total=config.steps, initial=start, unit="step", disable=None) as bar:
        for done, batch in zip(range(start + 1, config.steps + 1), data.read_ahead(batches, start), strict=False):
            began, rate = time.perf_counter(), lr(done - 1)
            state, values = step(state, put(batch), np.float32(rate))
            stopping = stop.is_set()  # once a step: what is asked for from here on is the next step's business
            last = done == config.steps or stopping
            log, evaluating, saving = last or due(config.log_every), to_evaluate(), last or due(config.save_every)
            if log or evaluating or saving or done == start + 1:
                values = jax.device_get(values)
            if done > start + 1:
                seconds, timed = seconds + time.perf_counter() - began, timed + 1
            bar.update()
            if log:
                train_seconds += seconds
                row = {
                    "step": done,
                    "tokens": done * tokens_per_step,
                    **_losses(values.pop("loss_nats"), config),
                    **values,
                    "lr": rate,
                    "train_seconds": round(train_seconds, 3),
                    "tokens_per_second": timed * tokens_per_step / seconds if timed else None,
                    "batch_hash": data.batch_hash(batch),
                }
                if peak and timed:
                    row["mfu"] = flops * row["tokens_per_second"] / (peak * devices)
                metrics.append(path, row)
                bar.set_postfix_str(f"loss {row['loss_nats']:.3f}")
                seconds, timed = 0.0, 0
            if saving:
                checkpoint.save(folder, done, state, keep=config.keep)
                saved = done
            if evaluating:
                evaluate_step()
            if stopping:
                line = f"stopped at step {saved} of {config.steps}, saved; the same command resumes it"
                print(line, file=sys.stderr)
                break
    return state


def _losses(nats, config):
    per_byte = {"bits_per_byte": float(nats) / np.log(2)} if config.tokenizer == "bytes" else {}
    return {"loss_nats": float(nats)} | per_byte


def _rows(path):
    return metrics.read(path) if path.exists() else []


def _restore(workdir, config, init):
    """(state, steps taken): the newest valid checkpoint, else the trunk that the run branches from, else step 0."""
    state = init(jax.random.key(config.seed))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    folder, step = workdir / "checkpoints", None
    if checkpoint.steps(folder):
        step, state = checkpoint.restore(folder, like)
    elif config.branch_from:
        trunk = Path(config.branch_from)
        if not trunk.name.isdecimal():
            raise ValueError(f"branch_from is {config.branch_from!r}, expected <workdir>/checkpoints/<step>")
        step, state = checkpoint.restore(trunk.parent, like, int(trunk.name))
        if step >= config.steps:
            raise ValueError(f"steps is {config.steps}, expected more than the {step} of branch_from")
    metrics.cut_back(workdir / "metrics.jsonl", step or 0)
    return state, step or 0


def _tokenizer(config, workdir):
    """The config's tokenizer, or the run's own copy of its file where that is gone."""
    if config.tokenizer in (*tokenizers.NAMES, "characters") or Path(config.tokenizer).expanduser().is_file():
        return config.tokenizer
    return tokenizers.carried(workdir) or config.tokenizer


def _write_config(workdir, config, fields, corpus):
    """`config.json` of a new workdir; in an old one, every field that the numbers depend on must be the same."""
    path = workdir / "config.json"
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
    record = {
        "model": fields,
        "seq_len": config.seq_len,
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "config": config.to_dict(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),  # on a GPU resume is exact only with deterministic ops
    }
    record = json.loads(json.dumps(record))
    if path.exists() and (checkpoint.steps(workdir / "checkpoints") or _rows(workdir / "metrics.jsonl")):
        old = json.loads(path.read_text())
        free = set(FREE_FIELDS) - ({"strategy"} if config.model.dropout else set())
        if old["corpus"]["sha256"] == corpus.sha256:
            free.add("tokenizer")  # the same one, perhaps under another path
        flat = lambda r: _flatten({"config": r["config"], "corpus": r["corpus"]})
        before, now = flat(old), flat(record)
        changed = [
            f"{key.removeprefix('config.')} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before | now)
            if before.get(key) != now.get(key) and key.removeprefix("config.") not in free
        ]
        if changed:
            raise ValueError(f"{workdir} holds a run of another config: {'; '.join(changed)}")
        return
    name = corpus.tokenizer
    record["tokenizer"] = (
        name if name in tokenizers.NAMES else tokenizers.save(tokenizers.get_tokenizer(name), workdir)
    )
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def _flatten(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, x in tree.items() for k, v in _flatten(x, f"{prefix}.{key}".lstrip(".")).items()}


@contextlib.contextmanager
def claimed(workdir):
    """One process at a time in a workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{workdir} is in use by another run") from None
        yield


@contextlib.contextmanager
def _stop_signals():
    """An event that SIGINT and SIGTERM set, for the loop to end after its step; a second one interrupts at once."""
    stop = threading.Event()

    def request(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.train",
        description="Train a model; the same command resumes.",
        allow_abbrev=False,
        epilog="--config.FIELD=VALUE sets any field of the config, for instance --config.optim.lr=6e-4",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", required=True)
    parser.add_argument("--workdir", required=True)
    args, overrides = parser.parse_known_args(argv)
    try:
        run(run_config.read(args.config, overrides), args.workdir)
    except KeyboardInterrupt:
        print("stopped; what was saved before stays", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
