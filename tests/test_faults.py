"""What can go wrong with a run from outside, and what is left of it: the table of docs/faults.md, row by row."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from test_train import ROOT, _config, _DiedError, _numbers, _same, _tiny

from rwkv_jax import checkpoint, data, metrics, train
from rwkv_jax.train import divergence
from rwkv_jax.train.__main__ import main


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("RWKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n)).decode() for n in rng.integers(2, 9, 200)]
    path.write_text(" ".join(rng.choice(words, 4000)))
    return str(path)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    state = train.run(_config(text), workdir)
    return workdir, jax.device_get(state)


@pytest.fixture
def half(text, tmp_path, monkeypatch):
    """The workdir of a run that died after its step 4 was saved."""
    append = metrics.append

    def dies(path, row):
        if row["step"] == 5:
            raise _DiedError
        append(path, row)

    monkeypatch.setattr(metrics, "append", dies)
    with pytest.raises(_DiedError):
        train.run(_config(text), tmp_path / "run")
    monkeypatch.undo()
    return tmp_path / "run"


def refused(text, workdir, capsys):
    """The line with which the command line refuses a workdir that it leaves as it is."""
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert main(_tiny(text, workdir)[5:]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    return line


def test_a_workdir_of_before_a_field_existed_resumes(half, finished, text):
    record = json.loads((half / "config.json").read_text())
    del record["config"]["strategy"], record["config"]["optim"]["l2wrap"], record["config"]["model"]["dropout"]
    (half / "config.json").write_text(json.dumps(record))
    assert _same(train.run(_config(text), half), finished[1])
    config = _config(text)
    config.optim.l2wrap = False
    with pytest.raises(ValueError, match=r"run of another config: optim\.l2wrap was True, now False$"):
        train.run(config, half)


@pytest.mark.parametrize("damage", ["", "[]", '{"config": 3}', '{"config": {}, "corpus": []}', b"\xff\xfe"])
def test_a_damaged_config_is_refused_by_name(damage, half, text, capsys):
    (half / "config.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert f"{half}/config.json is damaged" in refused(text, half, capsys)


@pytest.mark.parametrize("damage", ['{"step": "one"}', "[1, 2]", "{", '{"step": 1, "train_seconds": "x"}'])
def test_a_damaged_log_is_refused_by_line(damage, half, text, capsys):
    log = half / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:2], damage, *lines[2:]]) + "\n")
    assert f"{log}: line 3" in refused(text, half, capsys)


# ------------------------------------------------------------------------------------------ the disk


# Where one array cannot be written, Orbax closes the event loop that its writes of the others still report to.
_ORBAX = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def mounted(folder, *options):
    """`folder` as a file system of its own, of 4 MiB."""
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(["size=4m", *options]), "tmpfs", folder])
    if mount.returncode:
        pytest.skip("needs the right to mount; the limit on a file's size is tried without it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def files_limited(num_bytes):
    """No file may grow beyond; more fails in the middle of a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def newest(workdir):
    """The step of the newest checkpoint, whose files are as they were written."""
    step = checkpoint.steps(workdir / "checkpoints")[-1]
    checkpoint.verify(workdir / "checkpoints", step)
    return step


@_ORBAX
def test_a_write_that_fails_in_the_middle_leaves_the_checkpoint_before(half, finished, text, capsys):
    with files_limited(30_000):
        assert main(_tiny(text, half)[5:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*/checkpoints/6: not saved: .*; the newest checkpoint is of step 4", line), line
    assert [p.name for p in (half / "checkpoints").iterdir() if "partial" in p.name] == []
    assert newest(half) == 4
    assert _same(train.run(_config(text), half), finished[1])
    assert _numbers(half) == _numbers(finished[0])


@_ORBAX
def test_a_save_that_fails_is_told_and_the_next_one_tries_again(finished, text, tmp_path, monkeypatch, capsys):
    save = checkpoint.save_async

    def fails_at_2(folder, step, *args, **kwargs):
        if step != 2:
            return save(folder, step, *args, **kwargs)
        with files_limited(30_000):
            future = save(folder, step, *args, **kwargs)
            future.exception()
        return future

    monkeypatch.setattr(checkpoint, "save_async", fails_at_2)
    assert _same(train.run(_config(text), tmp_path), finished[1])
    told = [line for line in capsys.readouterr().err.splitlines() if "not saved" in line]
    assert len(told) == 1 and "/checkpoints/2: not saved: " in told[0] and "training goes on" in told[0]
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 6]


@_ORBAX
@pytest.mark.parametrize("lacking", ["bytes", "files"])
def test_a_full_disk_leaves_the_checkpoint_before(lacking, half, finished, text, tmp_path, capsys):
    """For want of bytes, which is known beforehand; of room for files, where the write fails."""
    with mounted(tmp_path / "disk", *(["nr_inodes=200"] if lacking == "files" else [])) as disk:
        subprocess.run(["cp", "-r", f"{half}/.", disk], check=True)
        if lacking == "bytes":
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))
        else:
            for i in range(os.statvfs(disk).f_favail - 3):
                (disk / f"filler{i}").touch()
        assert main(_tiny(text, disk)[5:]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(r"error: .*/checkpoints/6: not saved: .*; the newest checkpoint is of step 4", line), line
        assert newest(disk) == 4
        for filler in disk.glob("filler*"):
            filler.unlink()
        assert _same(train.run(_config(text), disk), finished[1])


def test_a_workdir_that_cannot_be_written_is_refused(text, tmp_path, capsys):
    with mounted(tmp_path / "disk", "ro"):
        line = refused(text, tmp_path / "disk", capsys)
    assert "Read-only file system" in line and str(tmp_path / "disk") in line


# ------------------------------------------------------------------------------------------ divergence


def test_steps_that_are_not_finite_end_the_run_once_they_are_too_many(finished, text, tmp_path, capsys):
    """A learning rate that throws the parameters away in step 1: nothing after it is finite."""
    lost = ["--config.optim.lr=1e30", "--config.max_skipped=2", "--config.save_every=1"]
    assert main([*_tiny(text, tmp_path), *lost][5:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    expected = (
        r"error: steps 2 to 4 are not finite in loss or gradient, max_skipped is 2; the newest checkpoint is of "
    )
    assert re.match(expected + r"step 3; docs/faults\.md ", line), line
    rows = [r for r in metrics.read(tmp_path / "metrics.jsonl") if "loss_nats" in r]
    assert [(r["step"], r["skipped"], r["loss_nats"] is None) for r in rows] == [
        (1, 0, False), (2, 1, True), (3, 2, True), (4, 3, True)
    ]  # fmt: skip


def test_a_few_steps_that_are_not_finite_are_counted_and_borne():
    watch = divergence.Watch(max_skipped=2, max_loss_rise=1.0, skipped=5)
    nan, skipped = float("nan"), [6, 7, 7, 8, 8]
    assert not any(watch.problem(i, nan if i in (1, 2, 4) else 3.0, skipped[i - 1]) for i in range(1, 6))
    assert not watch.problem(6, nan, 9) and not watch.problem(7, nan, 10)
    assert watch.problem(8, nan, 11).startswith("steps 6 to 8 are not finite")


def test_a_leap_of_the_loss_ends_the_run_and_its_batch_is_replayed_as_documented(finished, text, tmp_path, capsys):
    """The learning rate grows until the loss leaps; the lines of docs/faults.md then fetch the batch of that step."""
    wild = ["steps=60", "optim.lr=3.0", "optim.warmup=1.0", "max_loss_rise=0.5", "save_every=1"]
    assert main([*_tiny(text, tmp_path), *(f"--config.{field}" for field in wild)][5:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    rows = [r for r in metrics.read(tmp_path / "metrics.jsonl") if "loss_nats" in r]
    losses = [r["loss_nats"] for r in rows]
    step, rise = rows[-1]["step"], losses[-1] - np.mean(losses[-21:-1])
    assert f"loss {losses[-1]:.3f} of step {step} is {rise:.3f} above the mean of the 20 steps before" in line
    assert all(now - np.mean(losses[i : i + 20]) <= 0.5 for i, now in enumerate(losses[20:-1]))
    assert newest(tmp_path) == step - 1

    program = re.search("```python\n(.*?)```", (ROOT / "docs" / "faults.md").read_text(), re.S)[1]
    names = {}
    exec(re.sub(r'"runs/\w+", \d+', f'"{tmp_path}", {step}', program), names)
    assert data.batch_hash(names["batch"]) == rows[-1]["batch_hash"]
    assert names["nll_BT"].mean() == pytest.approx(losses[-1], rel=1e-5)


# ------------------------------------------------------------------------------------------ processes killed


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start(arguments)`: the command line in a process of its own, forked from one that has done the imports."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))  # a kill may cut its files short
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rwkv_jax.train.__main__"])

    def start(arguments):
        process = context.Process(target=main, args=(arguments,), daemon=True)
        process.start()
        return process

    return start


@pytest.mark.slow
def test_killed_20_times_a_run_ends_as_if_nothing_had_happened(start, text, tmp_path):
    """SIGKILL at random moments: among steps and saves (one a step), every fourth from the start of the command on."""
    command = lambda name, save_every: [
        *_tiny(text, tmp_path / name)[5:],
        *("--config.steps=400", "--config.eval_every=50", f"--config.save_every={save_every}"),
    ]
    moments, within, reached = random.Random(0), 0, [0]
    log, folder = tmp_path / "killed" / "metrics.jsonl", tmp_path / "killed" / "checkpoints"
    starts = lambda: sum("began" in row for row in metrics.read(log)) if log.exists() else 0
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
    assert _numbers(tmp_path / "killed") == _numbers(tmp_path / "whole")
    ends = [_arrays(tmp_path / name / "checkpoints" / "400") for name in ("killed", "whole")]
    assert len(ends[0]) > 20 and _same(*ends)


def _arrays(path):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), orbax.metadata(path).item_metadata.tree)
        leaves = jax.tree_util.tree_leaves_with_path(
            orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        )
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in leaves}
