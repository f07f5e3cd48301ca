"""The training loop, and the rows of its log."""

import contextlib
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rwkv_jax import checkpoint, data, evaluate, files, hardware
from rwkv_jax.data import batches
from rwkv_jax.train import divergence, hosts, metrics, parallel, progress, run_config
from rwkv_jax.train.assemble import Run, assembled
from rwkv_jax.train.step import TrainState, stored
from rwkv_jax.train.workdir import claimed, restore, write_config


def run(config, workdir, profile: range | None = None) -> TrainState:
    """Train to `config.steps`, resuming from `workdir`; SIGINT and SIGTERM save and return early.

    A trace of the steps in `profile`, numbered as in the log, goes to `workdir/profile`. Signals are handled only if
    this runs in the main thread.

    Returns:
        the state after the last step taken; its `step` is below `config.steps` if a signal ended the run.

    Raises:
        ValueError: a field of the config is invalid or does not fit the workdir, or no checkpoint in it is valid.
        OSError: a file cannot be read or written, or the last save failed.
        DivergedError: the run has diverged, see `divergence.Watch`.
    """
    workdir, began = files.user_path(workdir), time.time()
    hosts.check_joined()
    with hosts.together():
        files.check_output_folder(workdir)
        _use_compilation_cache(config.compilation_cache)
        this = assembled(config, workdir)
    config = this.config
    hosts.check_same("the config or corpus", f"{config}{this.corpus.sha256}")

    with contextlib.ExitStack() as held:
        with hosts.together():
            held.enter_context(claimed(workdir))
            held.callback(checkpoint.wait)  # finish writing before another run may claim the workdir
            write_config(workdir, config, run_config.model_fields(config), this.corpus)
        hosts.check_shared(workdir)
        before = metrics.logged(workdir / "metrics.jsonl")
        state, start = restore(workdir, config, this.model, this.method, this.init)
        if profile is not None and not start < profile.start < profile.stop <= config.steps + 1:
            raise ValueError(
                f"profile is {profile.start}:{profile.stop}, expected steps of this start, "
                f"from {start + 1} up to but without {config.steps + 1}"
            )
        clock = progress.Clock(before, start, began)
        clock.lap("startup")
        stop = held.enter_context(hosts.stop_signals())
        write, show = lambda row: None, lambda step, text: None
        if jax.process_index() == 0:  # only host 0 writes the log and to the terminal
            write = held.enter_context(metrics.opened(workdir, start, config.to_dict(), **config.logging))
            show = held.enter_context(progress.shown(start, config.steps))
        if start >= config.steps and jax.process_index() == 0:
            more = "for more steps, another workdir and --config.branch_from"
            print(f"step {start} of {config.steps} is done; {more}", file=sys.stderr)
        skipped = int(jax.device_get(state.skipped))
        return _loop(
            this, workdir, state, start, profile, Log(this, workdir, start, skipped, clock, write, show), stop
        )


def _use_compilation_cache(wanted: bool | None):
    """Cache compiled programs across restarts, in `data.cache_dir()` unless JAX is configured with a folder.

    On a CPU only on request: programs are compiled for one processor's instructions, and XLA may reject its own, or
    run another machine's until an instruction is missing (jax issue 38445).
    """
    wanted = jax.default_backend() != "cpu" if wanted is None else wanted
    if wanted and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_dir() / "compiled"))


def _loop(this: Run, workdir, state, start, profile, log, stop):
    config, folder = this.config, workdir / "checkpoints"
    first_host = jax.process_index() == 0
    if _unevaluated(config, workdir, start):  # killed between saving this step and evaluating it
        log.evaluated(start, validation(this, state))

    step, saving_behind = start, None  # the save that may still be running
    with contextlib.ExitStack() as trace:
        for step, batch in zip(range(start + 1, config.steps + 1), batches.read_ahead(this.mine, start), strict=False):
            lr = this.lr(step - 1)
            placed = this.put(batch)  # while the previous step runs, so that the next follows without a pause
            diagnosing = _due(config.diagnostics_every, step)
            if diagnosing or (profile and step == profile.start):
                log.settle()
            if diagnosing:
                state, seen = this.diagnose(state, placed, np.float32(lr))
                log.diagnosed(step, seen)
            if profile and step == profile.start:
                plain = trace.enter_context(files.plainly_named(workdir))
                trace.enter_context(jax.profiler.trace(str(plain / "profile")))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = this.step(state, placed, np.float32(lr))
            log.settle()  # the previous step

            stopping = stop(step - start)  # once a step: a later signal counts for the next one
            last = step == config.steps or stopping
            traced = profile and step in profile and (last or step == profile[-1])
            saving, evaluating = last or _due(config.save_every, step), _to_evaluate(config, step)
            log.dispatched(step, lr, values, last or _due(config.log_every, step))
            if saving or evaluating or traced or step == start + 1:
                log.settle()
            if traced:
                trace.close()
                print(f"profile: pip install xprof; xprof --logdir={workdir / 'profile'}", file=sys.stderr)
            if saving:
                if first_host and saving_behind and (error := saving_behind.exception()):
                    tqdm.write(f"{error}; training continues, this save retries", file=sys.stderr)
                saving_behind = checkpoint.save_async(folder, step, stored(state), keep=config.keep)
                log.clock.lap("save")
            if evaluating:
                log.evaluated(step, validation(this, state))
            if stopping:
                break
    with hosts.together():
        if saving_behind and (error := saving_behind.exception()):
            raise OSError(f"{error}; {_newest(folder)}")
    if step < config.steps and first_host:
        print(f"stopped at step {step} of {config.steps}, saved; the same command resumes it", file=sys.stderr)
    return state


def validation(this: Run, state) -> dict:
    """Losses on held-out text, in windows of the training length."""
    config = this.config
    held_out, counts = this.corpus.held_out(config.eval_tokens)
    with parallel.beside_the_step(config.strategy, config.replicas):
        params, initial = this.method.bind(this.model, state.params, state.frozen, config.batch_size)
        nll = evaluate.windows(this.model, params, held_out, config.seq_len, config.batch_size, initial)
    return _losses(nll[1:][counts[1:]].mean(), config)


class Log:
    """Writes the log rows of one start. A step's metrics are read after the next step is dispatched, so that no
    device waits for the host."""

    def __init__(self, this: Run, workdir, start: int, skipped: int, clock, write, show):
        config = this.config
        self.this, self.start, self.clock, self.write, self.show = this, start, clock, write, show
        self.folder = workdir / "checkpoints"
        self.watch = divergence.Watch(config.max_skipped, config.max_loss_rise, skipped)
        self.tokens_per_step = config.batch_size * config.seq_len
        self.devices = 1 if config.strategy == "single" else jax.device_count()
        self.peak = hardware.peak_flops(jax.devices()[0])
        self.flops_per_token = hardware.flops_per_token(this.model, config.seq_len)
        self.told = False  # a batch without a target was reported
        self.waiting = None  # the step dispatched last, whose metrics the host has not seen
        self.seconds, self.timed = 0.0, 0  # of steps since the last row, without compiling, evaluating and saving

    def dispatched(self, step: int, lr: float, values, logged: bool):
        self.waiting = (step, lr, values, logged)

    def settle(self):
        """Wait for the step dispatched last, if not yet settled, and write its row if due."""
        if self.waiting is None:
            return
        (step, lr, values, logged), self.waiting = self.waiting, None
        values = jax.device_get(jax.block_until_ready(values))  # see `workdir.restore`
        if step == self.start + 1:
            self.clock.lap("compile")
            # only after a step has succeeded: until the first row, the workdir accepts another config
            starts = {"began": self.clock.began, "starts": self.clock.starts}
            self.write({"step": self.start} | starts | self.clock.row())
        else:
            self.seconds, self.timed = self.seconds + self.clock.lap("train"), self.timed + 1
        losses = _losses(values.pop("loss_nats"), self.this.config)
        problem = self.watch.problem(step, losses["loss_nats"], int(values["skipped"]), values["targets"])
        if not values["targets"] and not self.told and jax.process_index() == 0:
            what = f"step {step}: no token of the batch is a target, such steps change nothing and count as skipped"
            tqdm.write(f"{what}; raise --config.batch_size or --config.seq_len", file=sys.stderr)
            self.told = True
        skipped = f", {self.watch.skipped} skipped" if self.watch.skipped else ""
        self.show(step, f"loss {losses['loss_nats']:.3f}{skipped}")
        if logged or problem:
            self._write_step(step, {**losses, **values, "lr": lr})
        if problem:
            newest = _newest(self.folder)
            raise divergence.DivergedError(f"{problem}; {newest}; docs/faults.md explains how to replay a batch")

    def _write_step(self, step: int, values: dict):
        speed = self.timed * self.tokens_per_step / self.seconds if self.seconds > 0 else None
        row = {"step": step, "tokens": step * self.tokens_per_step, **values}
        row |= {"tokens_per_second": speed, "tokens_per_second_per_device": speed and speed / self.devices}
        if self.peak and speed:
            row["mfu"] = self.flops_per_token * speed / (self.peak * self.devices)
        # of the rows of all hosts, the same on any number of them; only the host that logs it reads them
        hashed = batches.batch_hash(self.this.batches[step - 1]) if jax.process_index() == 0 else None
        self.write(row | self.clock.row() | {"batch_hash": hashed})
        self.seconds, self.timed = 0.0, 0

    def evaluated(self, step: int, losses: dict):
        self.write({"step": step} | {f"valid_{name}": value for name, value in losses.items()})
        self.clock.lap("evaluate")

    def diagnosed(self, step: int, seen):
        self.write({"step": step} | jax.device_get(seen))
        self.clock.lap("diagnose")


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _to_evaluate(config, step: int) -> bool:
    return bool(config.eval_tokens) and (step == config.steps or _due(config.eval_every, step))


def _unevaluated(config, workdir, step: int) -> bool:
    """Return whether `step` was saved and is due for evaluation but not evaluated; the same on all hosts."""
    evaluated = {row["step"] for row in metrics.logged(workdir / "metrics.jsonl") if "valid_loss_nats" in row}
    missing = (
        step in checkpoint.steps(workdir / "checkpoints") and step not in evaluated and _to_evaluate(config, step)
    )
    return bool(multihost_utils.broadcast_one_to_all(np.array(missing)))


def _newest(folder):
    checkpoint.wait()
    steps = checkpoint.steps(folder)
    return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"


def _losses(nats, config):
    per_byte = {"bits_per_byte": float(nats) / np.log(2)} if config.tokenizer == "bytes" else {}
    return {"loss_nats": float(nats)} | per_byte
