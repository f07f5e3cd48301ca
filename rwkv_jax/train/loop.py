"""One loop that reads top to bottom, and what a run needs before it."""

import contextlib
import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rwkv_jax import (
    checkpoint,
    corpora,
    data,
    evaluate,
    finetune,
    hardware,
    metrics,
    mixture,
    models,
    optim,
    parallel,
    run_config,
)
from rwkv_jax.train import divergence, hosts, progress
from rwkv_jax.train.diagnostics import make_diagnose
from rwkv_jax.train.step import TrainState, make_init, make_step, stored
from rwkv_jax.train.workdir import claimed, restore, rows, tokenizer, write_config


def run(config, workdir, profile: range | None = None) -> TrainState:
    """Train to `config.steps`, resuming what `workdir` holds; SIGINT and SIGTERM save and return early.

    A trace of the steps in `profile`, numbered as in the log, goes to `workdir/profile`.
    """
    if not str(workdir):
        raise ValueError("workdir is empty, expected a folder for the run")
    workdir, began = Path(workdir), time.time()
    hosts.check_joined()
    with hosts.together():
        run_config.check(config)
        metrics.check_installed(**config.logging)
        _use_compilation_cache(config.compilation_cache)
        method = finetune.method_of(config)
        if config.finetune.model:
            config = finetune.completed(config)
        fields = {k: v for k, v in config.model.to_dict().items() if not (k == "layers" and v is None)}
        model = models.build(**fields)
        method.check(model)
        parallel.check_divisible(config.batch_size, config.accumulation, config.strategy, config.replicas)
        _check_segments(config, model)
        lr = learning_rate(config, model)
        encoder = tokenizer(config, workdir)
        corpus = mixture.prepare(config.corpus, encoder, text=config.data.text, prompt=config.data.prompt)
        if corpus.vocab_size > model.vocab_size:
            raise ValueError(
                f"model.vocab_size is {model.vocab_size}, expected at least {corpus.vocab_size}, "
                f"the vocabulary of tokenizer {config.tokenizer!r}"
            )
        shape = {"seq_len": config.seq_len, "batch_size": config.batch_size}
        stream = functools.partial(data.dataset, corpus.train, **shape, seed=config.seed, order=config.data.order)
        batches, mine = stream(), stream(rows=parallel.rows(config.strategy, config.batch_size, config.replicas))
        o = config.optim
        recipe = (tuple(o.betas), o.eps, o.weight_decay, o.clip, tuple(tuple(g) for g in o.groups))
        init, *programs = _programs(
            model,
            method,
            recipe,
            (config.strategy, config.replicas),
            config.batch_size if config.carry_state else None,
            accumulation=config.accumulation,
            seed=config.seed,
            l2wrap=o.l2wrap,
            loss_chunk=config.loss_chunk,
            segments=config.segments,
            stop_gradient=config.stop_gradient,
        )
    hosts.check_same("the config or corpus", f"{config}{corpus.sha256}")

    with contextlib.ExitStack() as held:
        with hosts.together():
            held.enter_context(claimed(workdir))
            held.callback(checkpoint.wait)  # nothing of this run writes there any more when another may
            write_config(workdir, config, fields, corpus)
        hosts.check_shared(workdir)
        before = rows(workdir / "metrics.jsonl")
        state, start = restore(workdir, config, model, method, init)
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
        feed, sinks = (batches, mine), (clock, write)
        return _loop(workdir, config, (model, method), corpus, feed, lr, programs, state, start, profile, sinks, stop)


def _use_compilation_cache(wanted: bool | None):
    """Keep compiled programs over restarts, in `corpora.cache_dir()` unless JAX has been told a folder.

    On a CPU only where asked for: programs are made for one processor's instructions, and XLA may refuse its own, or
    run another machine's until it meets an instruction that is missing (jax issue 38445).
    """
    wanted = jax.default_backend() != "cpu" if wanted is None else wanted
    if wanted and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(corpora.cache_dir() / "compiled"))


@functools.cache
def _programs(model, method, recipe, strategy_and_replicas, carry_rows, **options):
    """(init, step, put, diagnose), compiled once a process: further runs of the same model start at once."""
    (strategy, replicas), tx = strategy_and_replicas, optim.optimiser(*recipe)
    init, options = make_init(model, tx, method, carry_rows), options | {"method": method}
    distribute = functools.partial(parallel.STRATEGIES[strategy], replicas=replicas)
    _, diagnose, _ = distribute(init, make_diagnose(model, tx, **options))
    return *distribute(init, make_step(model, tx, **options)), diagnose


def _check_segments(config, model):
    """One line where state cannot be handed on as the config asks."""
    if (config.carry_state or config.segments > 1) and set(model.layers) != {"rwkv4"}:
        raise ValueError(
            f"carry_state is {config.carry_state} and segments {config.segments}, expected False and 1: "
            f"layers are {model.layers}, and attention has no state of fixed size"
        )
    if config.finetune.method == "state" and (config.segments > 1 or config.data.order != "shuffled"):
        raise ValueError(
            f"data.order is {config.data.order!r} and segments {config.segments} with finetune.method 'state', "
            "expected 'shuffled' and 1: every row begins with the state that is learned"
        )
    if config.carry_state and config.data.order != "documents":
        raise ValueError(
            f"data.order is {config.data.order!r} with carry_state, expected 'documents': "
            "rows go on where they were in no other"
        )
    if config.seq_len % config.segments:
        raise ValueError(f"seq_len is {config.seq_len}, expected a multiple of {config.segments} segments")


def learning_rate(config, model):
    """The schedule of a run: learning rate of each step."""
    o, steps = config.optim, config.steps
    lr = optim.default_lr(model.layers[0], model.dim) if o.lr is None else o.lr
    lr_end = lr / 10 if o.lr_end is None else o.lr_end
    warmup, decay_start = round(o.warmup * steps), steps - round(o.decay * steps)
    return optim.schedule(o.schedule, lr, lr_end, steps, warmup, decay_start)


def _loop(workdir, config, model_and_method, corpus, feed, lr, programs, state, start, profile, sinks, stop):
    (batches, mine), (step, put, diagnose), (clock, write) = feed, programs, sinks
    model, method = model_and_method
    first_host = jax.process_index() == 0  # alone on the terminal
    folder = workdir / "checkpoints"
    tokens_per_step = config.batch_size * config.seq_len
    devices = 1 if config.strategy == "single" else jax.device_count()
    peak = hardware.peak_flops(jax.devices()[0])
    flops = hardware.flops_per_token(model, config.seq_len)
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
        hashed = data.batch_hash(batches[number - 1]) if first_host else None
        write(row | clock.row() | {"batch_hash": hashed})
        seconds, timed = 0.0, 0
        if problem:
            raise divergence.DivergedError(f"{problem}; {_newest(folder)}; docs/faults.md tells how to replay a batch")

    def evaluate_step():
        held_out, counts = corpus.held_out(config.eval_tokens)
        with parallel.beside_the_step(config.strategy, config.replicas):
            params, initial = method.bind(state.params, state.frozen, config.batch_size)
            nll = evaluate.windows(model, params, held_out, config.seq_len, config.batch_size, initial)
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
        for done, batch in zip(range(start + 1, config.steps + 1), data.read_ahead(mine, start), strict=False):
            rate = lr(done - 1)
            placed = put(batch)  # the step before is still running, and the next one follows it without a pause
            diagnosing, tracing = due(config.diagnostics_every), profile and done == profile.start
            if waiting and (diagnosing or tracing):
                settle(*waiting)
                waiting = None
            if diagnosing:
                state, seen = diagnose(state, placed, np.float32(rate))
                write({"step": done} | jax.device_get(seen))
                clock.lap("diagnose")
            if tracing:
                trace.enter_context(jax.profiler.trace(str(workdir / "profile")))
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, values = step(state, placed, np.float32(rate))
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
