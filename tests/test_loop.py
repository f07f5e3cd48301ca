"""The training loop around a step that costs nothing: what waits for what, and where the time goes."""

import itertools
import time

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax import hardware, metrics, models, run_config, train
from rwkv_jax.train import TrainState, prepare, progress


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.write_text("the quick brown fox " * 200)
    config = run_config.default()
    config.update(corpus=str(text), steps=6, seq_len=8, batch_size=4, eval_tokens=0, log_every=2, save_every=4)
    return config


@pytest.fixture
def events(monkeypatch):
    """A program whose loss is the number of its step, and what the loop does with it, in order."""
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
            loss = state.step.astype(jnp.float32) + 1
            return state.replace(step=state.step + 1), {"loss_nats": loss, "skipped": state.skipped}

        return lambda key: TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, (), jnp.int32(0)), step, put, None

    def look(values):
        if isinstance(values, dict) and "loss_nats" in values:
            events.append(f"look {int(values['loss_nats'])}")
        return real(values)

    monkeypatch.setattr(prepare, "_programs", programs)
    monkeypatch.setattr(jax, "device_get", look)
    return events


def test_a_row_has_the_share_of_the_peak_that_all_devices_reach(config, events, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e9)  # CPUs have no data sheet
    config.strategy = "pmap"  # four devices
    train.run(config, tmp_path / "run")
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["tokens_per_second_per_device"] == pytest.approx(row["tokens_per_second"] / 4)
    flops = hardware.flops_per_token(models.build(**config.model.to_dict() | {"layers": ("rwkv4",)}), 8)
    assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / 4e9)


def test_the_host_looks_at_a_step_once_the_next_is_on_its_way(config, events, tmp_path):
    """Except after the first, which compiles, before saving (step 4), and at the end."""
    train.run(config, tmp_path / "run")
    assert ", ".join(events) == (
        "put 1, step 1, look 1, put 2, step 2, put 3, step 3, look 2, "
        "put 4, step 4, look 3, look 4, put 5, step 5, put 6, step 6, look 5, look 6"
    )
    rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss_nats" in row]
    assert [(row["step"], row["loss_nats"]) for row in rows] == [(2, 2), (4, 4), (6, 6)]


class _DiedError(Exception):
    pass


def test_goodput_counts_every_moment_since_the_first_start(config, events, tmp_path, monkeypatch):
    """Dies after step 6 of 8 with the checkpoint of step 4: steps 5 and 6 were for nothing."""
    append = metrics.append

    def dies(path, row):
        append(path, row)
        if row["step"] == 6:
            raise _DiedError

    config.steps, workdir = 8, tmp_path / "run"
    began = time.time()
    monkeypatch.setattr(metrics, "append", dies)
    with pytest.raises(_DiedError):
        train.run(config, workdir)
    monkeypatch.setattr(metrics, "append", append)
    time.sleep(0.1)
    train.run(config, workdir)
    rows = metrics.read(workdir / "metrics.jsonl")
    starts = [row for row in rows if "began" in row]
    assert [(row["step"], row["starts"]) for row in starts] == [(0, 1), (4, 2)]
    last = [row for row in rows if "loss_nats" in row][-1]
    lost, wall = last["lost_seconds"], last["wall_seconds"]
    assert last["train_seconds"] + sum(lost.values()) == pytest.approx(wall, abs=0.01)
    assert last["goodput"] == pytest.approx(last["train_seconds"] / wall, abs=1e-3)
    assert 0.02 <= lost["redone"] < lost["redone"] + 0.1 <= wall <= time.time() - began
    assert lost["down"] >= 0.1 and lost["startup"] > 0 and lost["compile"] >= 0.02 and lost["save"] > 0
    assert 0.05 <= last["train_seconds"] < 0.5 * wall  # 2 to 4 and 6 to 8


def test_a_clock_goes_on_from_a_log_without_one(monkeypatch):
    """A workdir of an older version knows its training time alone."""
    clock = progress.Clock([{"step": 10, "train_seconds": 5.0}, {"step": 20, "train_seconds": 9.0}], 10, 1000.0)
    monkeypatch.setattr(time, "time", lambda: 1001.0)
    clock.lap("startup")
    row = clock.row()
    assert row["wall_seconds"] == 10.0 and row["train_seconds"] == 5.0 and row["goodput"] == 0.5
    assert {part: s for part, s in row["lost_seconds"].items() if s} == {"redone": 4.0, "startup": 1.0}


def test_lines_without_a_terminal_are_few_and_tell_the_time_left(monkeypatch, capsys):
    clock = itertools.count(0, 1.0)  # a second a step
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.shown(100, 135) as show:
        for step in range(101, 136):
            show(step, f"loss {step / 100:.2f}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == ["110", "120", "130", "135"]
    assert lines[1] == "120/135 steps [00:19<00:15,  1.00step/s, loss 1.20]"
