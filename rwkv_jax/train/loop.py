"""One loop that reads top to bottom."""

import contextlib
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rwkv_jax import checkpoint, corpora, data, evaluate, hardware, metrics, parallel, run_config
from rwkv_jax.train import divergence, hosts, progress
from rwkv_jax.train.prepare import prepared
from rwkv_jax.train.step import TrainState, stored
from rwkv_jax.train.workdir import claimed, restore, rows, write_config


def run(config, workdir, profile: range | None = None) -> TrainState:
    """Train to `config.steps`, resuming what `workdir` holds; SIGINT and SIGTERM save and return early.

    A trace of the steps in `profile`, numbered as in the log, goes to `workdir/profile`.
    """
    if not str(workdir):
        raise ValueError("workdir is empty, expected a folder for the run")
    workdir, began = Path(workdir), time.time()
    hosts.check_joined()
    with hosts.together():
        _use_compilation_cache(config.compilation_cache)
        r = prepared(config, workdir)
    config = r.config
    hosts.check_same("the config or corpus", f"{config}{r.corpus.sha256}")

    with contextlib.ExitStack() as held:
        with hosts.together():
            held.enter_context(claimed(workdir))
            held.callback(checkpoint.wait)  # nothing of this run writes there any more when another may
            write_config(workdir, config, run_config.model_fields(config), r.corpus)
        hosts.check_shared(workdir)
        before = rows(workdir / "metrics.jsonl")
        state, start = restore(workdir, config, r.model, r.method, r.init)
        if profile and not start < profile.start < profile.stop <= config.steps + 1:
            raise ValueError(
                f"profile is {profile.start}:{profile.stop}, expected steps of this start, "
                f"from {start + 1} up to but without {config.steps + 1}"
            )
        clock = progress.Clock(before, start, began)
        clock.lap("startup")
        stop = held.enter_context(hosts.stop_signals())
        write = lambda row: None  # the first host is alone in writing the log
        if jax.process_index() == 0:
            write = held.enter_context(metrics.opened(workdir, start, config.to_dict(), **config.logging))
        return _loop(r, workdir, state, start, profile, clock, write, stop)


def _use_compilation_cache(wanted: bool | None):
    """Keep compiled programs over restarts, in `corpora.cache_dir()` unless JAX has been told a folder.

    On a CPU only where asked for: programs are made for one processor's instructions, and XLA may refuse its own, or
    run another machine's until it meets an instruction that is missing (jax issue 38445).
    """
    wanted = jax.default_backend() != "cpu" if wanted is None else wanted
    if wanted and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(corpora.cache_dir() / "compiled"))


def _loop(r, workdir, state, start, profile, clock, write, stop):
    config, folder = r.config, workdir / "checkpoints"
    first_host = jax.process_index() == 0  # alone on the terminal
    tokens_per_step = config.batch_size * config.seq_len
    devices = 1 if config.strategy == "single" else jax.device_count()
    peak = hardware.peak_flops(jax.devices()[0])
    flops = hardware.flops_per_token(r.model, config.seq_len)
    seconds, timed = 0.0, 0  # since the last row, without compilation, evaluation and saving
    done, saving_behind = start, None  # the save that may still be going on
    due = lambda every: every and done % every == 0
    watch = divergence.Watch(config.max_skipped, config.max_loss_rise, int(jax.device_get(state.skipped)))

    def settle(number, rate, values, log):
        """Wait for a step that was dispatched, and log it where that is due."""
        nonlocal seconds, timed
        values = jax.device_get(values)
        if number == start + 1:
            clock.lap("compile")
            # not before a step has worked: until there is a row, the workdir takes another config
            write({"step": start, "began": clock.began, "starts": clock.starts} | clock.row())
        else:
            seconds, timed = seconds + clock.lap("train"), timed + 1
        losses = _losses(values.pop("loss_nats"), config)
        problem = watch.problem(number, losses["loss_nats"], int(values["skipped"]))
        show(number, f"loss {losses['loss_nats']:.3f}" + (f", {watch.skipped} skipped" if watch.skipped else ""))
        if not (log or problem):
            return
        speed = timed * tokens_per_step / seconds if timed else None
        row = {"step": number, "tokens": number * tokens_per_step, **losses, **values, "lr": rate}
        row |= {"tokens_per_second": speed, "tokens_per_second_per_device": speed and speed / devices}
        if peak and timed:
            row["mfu"] = flops * speed / (peak * devices)
        # of the rows of all hosts, the same on any number of them; only the host that logs it reads them
        hashed = data.batch_hash(r.batches[number - 1]) if first_host else None
        write(row | clock.row() | {"batch_hash": hashed})
        seconds, timed = 0.0, 0
        if problem:
            raise divergence.DivergedError(f"{problem}; {_newest(folder)}; docs/faults.md tells how to replay a batch")

    def evaluate_step():
        held_out, counts = r.corpus.held_out(config.eval_tokens)
        with parallel.beside_the_step(config.strategy, config.replicas):
            params, initial = r.method.bind(r.model, state.params, state.frozen, config.batch_size)
            nll = evaluate.windows(r.model, params, held_out, config.seq_len, config.batch_size, initial)
        losses = _losses(nll[1:][counts[1:]].mean(), config)
        write({"step": done} | {f"valid_{k}": v for k, v in losses.items()})
        clock.lap("evaluate")

    to_evaluate = lambda: config.eval_tokens and (done == config.steps or due(config.eval_every))
    evaluated = {r["step"] for r in rows(workdir / "metrics.jsonl") if "valid_loss_nats" in r}
    missing = start in checkpoint.steps(folder) and start not in evaluated and to_evaluate()
    if multihost_utils.broadcast_one_to_all(np.array(bool(missing))):
        evaluate_step()  # killed between saving this step and evaluating it

    shown = progress.shown(start, config.steps) if first_host else contextlib.nullcontext(lambda done, text: None)
    with shown as show, contextlib.ExitStack() as trace:
        waiting = None  # the step dispatched last, whose metrics the host has not seen
        for done, batch in zip(range(start + 1, config.steps + 1), data.read_ahead(r.mine, start), strict=False):
            rate = r.lr(done - 1)
            placed = r.put(batch)  # the step before is still running, and the next one follows it without a pause
            diagnosing, tracing = due(config.diagnostics_every), profile and done == profile.start
            if waiting and (diagnosing or tracing):
                settle(*waiting)
                waiting = None
            if diagnosing:
                state, seen = r.diagnose(state, placed, np.float32(rate))
                write({"step": done} | jax.device_get(seen))
                clock.lap("diagnose")
            if tracing:
                trace.enter_context(jax.profiler.trace(str(workdir / "profile")))
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, values = r.step(state, placed, np.float32(rate))
            if waiting:
                settle(*waiting)
            stopping = stop(done - start)  # once a step: what is asked for from here on is the next step's business
            last = done == config.steps or stopping
            traced = profile and done in profile and (last or done == profile[-1])
            saving, evaluating = last or due(config.save_every), to_evaluate()
            waiting = (done, rate, values, last or due(config.log_every))
            if saving or evaluating or traced or done == start + 1:
                settle(*waiting)
                waiting = None
            if traced:
                trace.close()
                print(f"profile: pip install xprof; xprof --logdir={workdir / 'profile'}", file=sys.stderr)
            if saving:
                if first_host and saving_behind and (error := saving_behind.exception()):
                    tqdm.write(f"{error}; training goes on, this save tries again", file=sys.stderr)
                saving_behind = checkpoint.save_async(folder, done, stored(state), keep=config.keep)
                clock.lap("save")
            if evaluating:
                evaluate_step()
            if stopping:
                break
    with hosts.together():
        if saving_behind and (error := saving_behind.exception()):
            raise OSError(f"{error}; {_newest(folder)}")
    if done < config.steps and first_host:
        print(f"stopped at step {done} of {config.steps}, saved; the same command resumes it", file=sys.stderr)
    return state


def _newest(folder):
    checkpoint.wait()
    steps = checkpoint.steps(folder)
    return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"


def _losses(nats, config):
    per_byte = {"bits_per_byte": float(nats) / np.log(2)} if config.tokenizer == "bytes" else {}
    return {"loss_nats": float(nats)} | per_byte
