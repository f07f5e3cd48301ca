"""Faults from outside a run: full disks, failing writes, and kills. See docs/faults.md."""

import contextlib
import multiprocessing
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import training
from training import numbers, same

from rwkv_jax import checkpoint, train
from rwkv_jax.train import metrics
from rwkv_jax.train.__main__ import main

# If one array cannot be written, Orbax closes the event loop that its other writes still report to.
ORBAX = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NOT_SAVED = r"error: .*/checkpoints/6: not saved: .*; the newest checkpoint is of step 4"


@contextlib.contextmanager
def mounted(folder, *options):
    """`folder` as a file system of its own, of 4 MiB."""
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(["size=4m", *options]), "tmpfs", folder])
    if mount.returncode:
        pytest.skip("needs the right to mount a full and a read-only disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def files_limited(num_bytes):
    """Limits the size of every file: larger ones fail in the middle of a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def newest(workdir):
    """The step of the newest checkpoint, after a check that its files are undamaged."""
    step = checkpoint.steps(workdir / "checkpoints")[-1]
    checkpoint.verify(workdir / "checkpoints", step)
    return step


@ORBAX
def test_run_ends_after_a_failed_last_save_and_keeps_the_previous_checkpoint(half, runs, text, capsys):
    with files_limited(30_000):
        assert main(training.arguments(text, half)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(NOT_SAVED, line), line
    assert [p.name for p in (half / "checkpoints").iterdir() if "partial" in p.name] == []
    assert newest(half) == 4
    assert same(train.run(training.config(text), half), runs.state)
    assert numbers(half) == numbers(runs.whole)


@ORBAX
def test_run_reports_a_failed_save_and_the_next_save_succeeds(runs, text, tmp_path, monkeypatch, capsys):
    save = checkpoint.save_async

    def fails_at_2(folder, step, *args, **kwargs):
        with files_limited(30_000) if step == 2 else contextlib.nullcontext():
            future = save(folder, step, *args, **kwargs)
            future.exception()
        return future

    monkeypatch.setattr(checkpoint, "save_async", fails_at_2)
    assert same(train.run(training.config(text), tmp_path), runs.state)
    told = [line for line in capsys.readouterr().err.splitlines() if "not saved" in line]
    assert len(told) == 1 and "/checkpoints/2: not saved: " in told[0] and "training continues" in told[0]
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 6]


def test_run_detects_a_full_disk_before_a_save(half, runs, text, tmp_path, capsys):
    with mounted(tmp_path / "disk") as disk:
        subprocess.run(["cp", "-r", f"{half}/.", disk], check=True)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))
        assert main(training.arguments(text, disk)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(NOT_SAVED, line) and "MiB are free" in line, line
        assert newest(disk) == 4
        (disk / "filler").unlink()
        assert same(train.run(training.config(text), disk), runs.state)


def test_run_refuses_a_read_only_workdir(toy, text, tmp_path, capsys):
    with mounted(tmp_path / "disk", "ro") as disk:
        assert main(training.arguments(text, disk)) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1, line
        assert not list(disk.iterdir())
    assert "Read-only file system" in line and str(tmp_path / "disk") in line


# ------------------------------------------------------------------------------------------ processes killed


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start(arguments)`: the command line in a process of its own, forked from one that has done the imports."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))  # a kill may cut its files short
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rwkv_jax.train.__main__"])

    def start(arguments):
        process = context.Process(target=main, args=(arguments,), daemon=True)
        process.start()
        return process

    return start


@pytest.mark.slow
def test_run_killed_20_times_ends_bit_equal_to_an_undisturbed_run(start, text, tmp_path):
    """SIGKILL at random moments among steps and saves (one a step); every fourth from the start of the command on."""
    command = lambda name, save_every: training.arguments(
        text, tmp_path / name, steps=400, eval_every=50, save_every=save_every
    )
    moments, within, reached = random.Random(0), 0, [0]
    log, folder = tmp_path / "killed" / "metrics.jsonl", tmp_path / "killed" / "checkpoints"
    starts = lambda: sum("began" in row for row in metrics.logged(log)) if log.exists() else 0
    for attempt in range(20):
        before, process = starts(), start(command("killed", 1))
        deadline = time.monotonic() + 120
        while attempt % 4 != 3 and starts() == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 3.0 if attempt % 4 == 3 else 0.7))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        within += any("partial" in path.name for path in folder.iterdir())
        reached.append(max(checkpoint.steps(folder), default=0))
    print(f"{within} of 20 kills within a save; checkpoints reached: {reached}")
    assert within >= 5 and reached == sorted(reached) and reached[-1] < 400
    for name in ("killed", "whole"):
        process = start(command(name, 0))
        process.join()
        assert process.exitcode == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    ends = [_arrays(tmp_path / name / "checkpoints" / "400") for name in ("killed", "whole")]
    assert len(ends[0]) > 20 and same(*ends)


def _arrays(path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), orbax.metadata(path).item_metadata.tree)
        return jax.tree.leaves(orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))
