"""The loop around a step that costs nothing: its order of events, its log, and runs killed at any row."""

import contextlib
import itertools
import os
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import training

from rwkv_jax import checkpoint, data, hardware, models, train
from rwkv_jax.data import batches, mixture
from rwkv_jax.train import TrainState, assemble, hosts, loop, metrics, progress, run_config


@pytest.fixture
def config(text):
    config = run_config.default()
    config.update(corpus=text, steps=6, seq_len=8, batch_size=4, eval_tokens=0, log_every=2, save_every=4)
    return config


@pytest.fixture
def events(monkeypatch):
    """The events of the loop, in order, with a program whose loss is the number of its step."""
    events, real = [], jax.device_get

    def programs(*_, **__):
        numbers = {"put": itertools.count(1), "step": itertools.count(1)}

        def note(what):
            events.append(f"{what} {next(numbers[what])}")

        def put(batch):
            note("put")
            return batch

        def step(state, batch, lr):
            note("step")
            time.sleep(0.01)
            taken = np.int32(int(state.step) + 1)
            return state.replace(step=taken), {"loss_nats": np.float32(taken), "skipped": state.skipped, "targets": 1}

        zero, params = jax.device_put((np.int32(0), {"w": np.zeros(2, np.float32)}))
        return lambda key: TrainState(zero, params, (), zero), step, put, None

    def look(values):
        if isinstance(values, dict) and "loss_nats" in values:
            events.append(f"look {int(values['loss_nats'])}")
        return real(values)

    monkeypatch.setattr(assemble, "_programs", programs)
    monkeypatch.setattr(jax, "device_get", look)
    return events


def test_log_row_has_the_speed_and_the_share_of_peak_of_all_devices(config, events, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e9)  # CPUs have no data sheet
    monkeypatch.setattr(progress.Clock, "lap", lambda self, part: 0.5)  # seconds of a step
    config.strategy = "pmap"  # four devices
    train.run(config, tmp_path / "run")
    row = metrics.logged(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["tokens_per_second"] == 4 * 8 / 0.5 and row["tokens_per_second_per_device"] == 4 * 8 / 0.5 / 4
    flops = hardware.flops_per_token(models.build(**config.model.to_dict() | {"layers": ("rwkv4",)}), 8)
    assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / 4e9)


def test_loop_reads_the_metrics_of_a_step_after_dispatching_the_next(config, events, tmp_path):
    """Exceptions: after the first step, which compiles, before saving (step 4), and at the end."""
    train.run(config, tmp_path / "run")
    assert ", ".join(events) == (
        "put 1, step 1, look 1, put 2, step 2, put 3, step 3, look 2, "
        "put 4, step 4, look 3, look 4, put 5, step 5, put 6, step 6, look 5, look 6"
    )
    rows = [row for row in metrics.logged(tmp_path / "run" / "metrics.jsonl") if "loss_nats" in row]
    assert [(row["step"], row["loss_nats"]) for row in rows] == [(2, 2), (4, 4), (6, 6)]


def test_profile_of_a_workdir_with_a_name_that_is_not_utf8_has_a_plain_path(config, events, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def trace(path):
        events.append(f"on {path.encode().decode()}")  # as JAX's profiler does when the trace ends
        yield
        events.append("off")

    monkeypatch.setattr(jax.profiler, "trace", trace)
    train.run(config, tmp_path / "\udce4[a]", range(2, 4))
    (begin, on), (end, _) = [(i, event) for i, event in enumerate(events) if event.startswith(("on", "off"))]
    assert on.endswith("/profile")
    traced = [event for event in events[begin:end] if event.startswith(("step", "look"))]
    assert traced == ["step 2", "step 3", "look 2", "look 3"]


@pytest.mark.parametrize("profile", [range(4, 4), range(5, 8), range(0, 2)])
def test_run_refuses_to_profile_steps_that_it_does_not_take(profile, config, events, tmp_path):
    with pytest.raises(ValueError, match="expected steps of this start, from 1 up to but without 7"):
        train.run(config, tmp_path / "run", profile)


@pytest.mark.parametrize(
    ("wanted", "backend", "is_set"),
    [(None, "cpu", False), (None, "gpu", True), (True, "cpu", True), (False, "gpu", False)],
)
def test_compilation_cache_is_on_by_default_except_on_a_cpu(wanted, backend, is_set, monkeypatch):
    updated = {}
    settings = SimpleNamespace(jax_compilation_cache_dir=None, update=updated.__setitem__)
    monkeypatch.setattr(loop, "jax", SimpleNamespace(default_backend=lambda: backend, config=settings))
    loop._use_compilation_cache(wanted)
    assert updated == ({"jax_compilation_cache_dir": str(data.cache_dir() / "compiled")} if is_set else {})


def test_goodput_counts_all_time_since_the_first_start(config, events, tmp_path, monkeypatch):
    """Dies before row 8 with the checkpoint of step 4: the logged steps 5 and 6 are redone, and unlogged time counts
    as down. The first step of each start compiles."""
    seconds, look = [1e9], jax.device_get

    def after(number, function):
        def slow(*args, **kwargs):
            seconds[0] += number
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(time, "time", lambda: seconds[0])
    monkeypatch.setattr(assemble, "_programs", after(10, assemble._programs))
    monkeypatch.setattr(checkpoint, "save_async", after(5, checkpoint.save_async))
    monkeypatch.setattr(jax, "device_get", lambda x: after(isinstance(x, dict) and "loss_nats" in x, look)(x))
    config.steps, workdir = 8, tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(training.DiedError):
        training.die_before(patch, lambda row: row["step"] == 8)
        train.run(config, workdir)
    seconds[0] += 100
    train.run(config, workdir)
    rows = metrics.logged(workdir / "metrics.jsonl")
    assert [(row["step"], row["starts"]) for row in rows if "began" in row] == [(0, 1), (4, 2)]
    last = [row for row in rows if "loss_nats" in row][-1]
    spent = {part: s for part, s in last["lost_seconds"].items() if s}
    assert spent == {"startup": 20, "compile": 2, "save": 5, "redone": 2, "down": 102}
    assert last["train_seconds"] == 6 and last["wall_seconds"] == 137  # 2 to 4 and 6 to 8
    assert last["goodput"] == round(6 / 137, 4)


# ------------------------------------------------------------------------------------------ with the toy


def test_log_row_has_the_rate_batch_and_tokens_of_its_own_step(runs, text):
    config = training.config(text)
    lr = train.learning_rate(config, models.build("rwkv4", vocab_size=256, num_layers=2, dim=32))
    corpus = mixture.prepare(text, "bytes")
    stream = batches.dataset(corpus.train, seq_len=16, batch_size=4, seed=0)
    rows = [row for row in training.numbers(runs.whole) if "loss_nats" in row]
    assert [row["step"] for row in rows] == list(range(1, training.STEPS + 1))
    for row in rows:
        step = row["step"]
        assert row["lr"] == lr(step - 1) and row["tokens"] == step * 4 * 16
        assert row["batch_hash"] == batches.batch_hash(stream[step - 1])
        assert row["grad_norm"] == stream[step - 1]["tokens"][:, 1:].mean() / 256  # computed on this batch
    assert len({row["batch_hash"] for row in rows}) == training.STEPS
    held_out, counts = corpus.held_out(256)
    nats_N = training.toy_windows(None, runs.state.params, held_out, 16, 4)
    assert training.losses(runs.whole, "valid_loss_nats")[6] == pytest.approx(nats_N[1:][counts[1:]].mean(), rel=1e-6)


def test_log_is_complete_and_in_order_after_a_death_before_any_row(toy, text, tmp_path):
    """Rows are starts, steps and evaluations. Step 3 is saved before its evaluation, which may therefore be
    missing."""
    config = lambda: training.config(text, save_every=3)
    state = train.run(config(), tmp_path / "whole")
    expected, num_rows = training.numbers(tmp_path / "whole"), training.STEPS + 3
    assert len(metrics.logged(tmp_path / "whole" / "metrics.jsonl")) == num_rows
    for number in range(num_rows):
        workdir, written = tmp_path / str(number), itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            training.die_before(patch, lambda row: next(written) == number)  # noqa: B023 (used in this turn of the loop only)
            with pytest.raises(training.DiedError):
                train.run(config(), workdir)
        if (workdir / "metrics.jsonl").exists():
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 6, "loss')
        assert training.same(train.run(config(), workdir), state), number
        assert training.numbers(workdir) == expected, number


def test_step_is_traced_once_over_interruption_and_resume(toy, text, tmp_path, monkeypatch):
    traces = []

    def counting(*args, **kwargs):
        step = training.toy_step(*args, **kwargs)
        return lambda *a, **k: (traces.append(1), step(*a, **k))[1]

    monkeypatch.setattr(assemble, "make_step", counting)
    config = training.config(text)
    config.optim.eps = 1e-7  # a value used only here: no other test has compiled this program
    with pytest.MonkeyPatch.context() as patch, pytest.raises(training.DiedError):
        training.die_before(patch, lambda row: row["step"] == 5)
        train.run(config, tmp_path)
    train.run(config, tmp_path)
    assert len(traces) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_run_saves_its_step_and_ends_on_a_signal(signum, runs, text, tmp_path, monkeypatch, capfd):
    append = metrics.append

    def signalled(path, row):
        append(path, row)
        if row["step"] == 3 and "loss_nats" in row:
            os.kill(os.getpid(), signum)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", signalled)
        stopped = int(train.run(training.config(text), tmp_path).step)
    assert 3 <= stopped < training.STEPS and checkpoint.steps(tmp_path / "checkpoints")[-1] == stopped
    first, *_, last = capfd.readouterr().err.splitlines()
    assert (
        first == hosts.STOPPING.decode().rstrip() and f"stopped at step {stopped} of {training.STEPS}, saved" in last
    )
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert training.same(train.run(training.config(text), tmp_path), runs.state)
    assert training.numbers(tmp_path) == training.numbers(runs.whole)


@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_run_resumes_under_another_strategy_with_the_carry_of_its_rows(strategy, toy, text, tmp_path):
    config = lambda **changes: training.config(text, carry_state=True, data={"order": "documents"}, **changes)
    state = train.run(config(), tmp_path / "whole")
    assert np.any(np.asarray(state.carry[0]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(training.DiedError):
        training.die_before(patch, lambda row: row["step"] == 5)
        train.run(config(), tmp_path / "run")
    again = train.run(config(strategy=strategy), tmp_path / "run")
    assert {shard.data.shape[0] for shard in again.carry[0].addressable_shards} == {1}
    assert training.same(again, state)
    assert training.numbers(tmp_path / "run") == training.numbers(tmp_path / "whole")
