"""Several hosts, as processes on one machine: they train as one, are killed, freeze, stop, and resume."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from judge import error_ratio
from training import numbers, same

import rwkv_jax
from rwkv_jax import checkpoint, train
from rwkv_jax.train import hosts, metrics, optim, run_config

ROOT = Path(__file__).parents[2]
STEPS = 36
PATIENCE = 240  # limit in seconds for every wait, except for ends that are due within a minute


@pytest.fixture(scope="module")
def place(text):
    """A folder with a text."""
    return Path(text).parent


def _arguments(place, workdir, strategy="fsdp", *more):
    model = ["model.num_layers=1", "model.dim=32", f"corpus={place}/corpus.txt", "seq_len=16", "batch_size=8"]
    log = ["log_every=1", "eval_every=18", "eval_tokens=256", "save_every=6", "keep=9"]
    # A large eps keeps Adam from turning rounding into +-lr.
    run = [f"steps={STEPS}", f"strategy={strategy}", "optim.eps=1e-3"]
    fields = [f"--config.{x}" for x in (*model, *log, *run, *more)]
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *fields]


def _config(place, strategy, *more):
    return run_config.read("configs/tiny.py", _arguments(place, "", strategy, *more)[2:])


def _start(command, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # XLA_FLAGS gives this process four devices
    inherited["PYTHONWARNINGS"] = "error"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=inherited | environment, **pipes)


def _launch(arguments, hosts=2, devices=2):
    launcher = [sys.executable, "-m", "rwkv_jax.train.launch"]
    return _start([*launcher, f"--hosts={hosts}", f"--devices={devices}", "--", *arguments])


def _pair(first, second):
    """Two hosts of two devices started as on a cluster, without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    where = [f"--coordinator={address}", "--num_hosts=2"]
    command = [sys.executable, "-m", "rwkv_jax.train"]
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_BIND_ADDRESS": address}
    return [
        _start([*command, *arguments, *where, f"--host={i}"], **cpu) for i, arguments in enumerate((first, second))
    ]


def _ended(process, timeout=PATIENCE):
    """(exit code, lines on stderr)."""
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, err.splitlines()


def _reached(workdir, step, *processes):
    """Wait until the log contains `step`."""
    deadline, path = time.monotonic() + PATIENCE, workdir / "metrics.jsonl"
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if path.exists() and any(row["step"] >= step for row in metrics.logged(path)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {[_ended(process) for process in processes]}")


def _column(workdir, name):
    return [row[name] for row in numbers(workdir) if name in row]


def _state(workdir, step=STEPS):
    model = rwkv_jax.build("rwkv4", vocab_size=256, num_layers=1, dim=32)
    like = jax.eval_shape(train.make_init(model, optim.optimiser()), jax.random.key(0))
    return checkpoint.restore(workdir / "checkpoints", like, step)[1]


def _errors(lines):
    """Error lines of the hosts, filtered from the output of libraries."""
    return [line for line in lines if line.startswith("error: ")]


# ----------------------------------------------------------------------------------- without processes: fast


@pytest.mark.parametrize(
    "distributed, told, expected",
    [
        (False, ("a:1", None, 0), "--num_hosts missing: expected --coordinator, --num_hosts and --host together"),
        (True, (None, None, 0), "expected --distributed, or --coordinator, --num_hosts and --host, not both"),
        (False, ("a", 2, 0), "--coordinator is 'a', expected address:port of host 0"),
        (False, ("a:1", 2, 2), "--host is 2, expected 0 to 1 for --num_hosts=2"),
    ],
)
def test_join_names_a_wrong_combination_of_flags(distributed, told, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        hosts.join(distributed, *told)


def test_run_on_an_unconnected_host_of_a_pod_asks_for_distributed(monkeypatch, tmp_path):
    """On a pod JAX reports the number of all hosts without `jax.distributed`."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="this is one of 4 hosts, expected --distributed on each"):
        train.run(run_config.default(), tmp_path / "run")


# -------------------------------------------------------------------------------------------- processes: slow


@pytest.fixture(scope="module")
def whole(place):
    """`whole(strategy)`: workdir and output of two undisturbed hosts of two devices."""

    @functools.cache
    def whole(strategy):
        workdir = place / f"pair-{strategy}"
        code, lines = _ended(_launch(_arguments(place, workdir, strategy)))
        assert code == 0, lines
        return workdir, lines

    return whole


@pytest.fixture(scope="module")
def alone(place):
    """`alone(strategy)`: workdir and state of the four devices of this process."""

    @functools.cache
    def alone(strategy):
        workdir = place / f"alone-{strategy}"
        return workdir, jax.device_get(train.run(_config(place, strategy), workdir))

    return alone


def _check_close(workdir, other, state):
    """Check for equal batches, and for losses and parameters that agree up to rounding."""
    assert _column(workdir, "batch_hash") == _column(other, "batch_hash")
    for name in ("loss_nats", "valid_loss_nats"):
        assert _column(workdir, name) == pytest.approx(_column(other, name), rel=1e-6)
    errors = jax.tree.map(error_ratio, _state(workdir).params, state.params)
    assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_two_hosts_train_as_one_host_with_their_devices(strategy, whole, alone):
    """Only the order of the sums over devices differs."""
    workdir, lines = whole(strategy)
    _check_close(workdir, *alone(strategy))
    # only one host logs
    assert _column(workdir, "tokens") == [128 * step for step in range(1, STEPS + 1)]
    assert len(_column(workdir, "valid_loss_nats")) == 2
    assert sorted(path.name for path in workdir.iterdir()) == [".lock", "checkpoints", "config.json", "metrics.jsonl"]
    assert len([line for line in lines if f"{STEPS}/{STEPS} steps" in line]) == 1
    assert len(list((workdir.parent / "cache").glob("*/train.bin"))) == 1


@pytest.mark.slow
def test_launch_ends_all_hosts_when_one_is_killed_and_resumes_exactly(place, whole):
    workdir = place / "killed"
    launcher = _launch(_arguments(place, workdir, "pmap"))
    _reached(workdir, 20, launcher)
    (host,) = subprocess.check_output(["pgrep", "-P", str(launcher.pid), "-f", "--", "--host=1"], text=True).split()
    os.kill(int(host), signal.SIGKILL)
    code, lines = _ended(launcher, 60)
    assert code == 128 + signal.SIGKILL
    assert "host 1 was killed by SIGKILL; the same command resumes" in lines
    assert max(checkpoint.steps(workdir / "checkpoints")) < STEPS
    code, lines = _ended(_launch(_arguments(place, workdir, "pmap")))
    assert code == 0, lines
    assert numbers(workdir) == numbers(whole("pmap")[0])
    assert same(_state(workdir), _state(whole("pmap")[0]))


@pytest.mark.slow
def test_hosts_stop_and_end_together_and_resume_exactly(place, whole):
    """SIGTERM to the second host, SIGKILL to the first, SIGSTOP to the second, all without a launcher; then a run to
    the end."""
    workdir = place / "disturbed"
    arguments = _arguments(place, workdir)

    pair = _pair(arguments, arguments)
    _reached(workdir, 5, *pair)
    pair[1].send_signal(signal.SIGTERM)
    (first, lines), (second, _) = (_ended(host) for host in pair)
    assert first == second == 0, lines
    (stopped,) = checkpoint.steps(workdir / "checkpoints")[-1:]
    assert lines[-1] == f"stopped at step {stopped} of {STEPS}, saved; the same command resumes it"

    for signum, victim in ((signal.SIGKILL, 0), (signal.SIGSTOP, 1)):
        before = metrics.logged(workdir / "metrics.jsonl")[-1]["step"]
        pair = _pair(arguments, arguments)
        _reached(workdir, before + 3, *pair)
        pair[victim].send_signal(signum)
        code, lines = _ended(pair[1 - victim], 60)
        assert code != 0, lines
        pair[victim].kill()
        _ended(pair[victim])

    pair = _pair(arguments, arguments)
    assert [_ended(host)[0] for host in pair] == [0, 0]
    assert numbers(workdir) == numbers(whole("fsdp")[0])
    assert same(_state(workdir), _state(whole("fsdp")[0]))


@pytest.mark.slow
def test_run_resumes_with_fewer_hosts_and_devices(place, alone):
    """Two hosts with eight devices, one with four, one with one; only the order of the sums differs."""
    workdir = place / "shrinking"
    for num_hosts, devices in ((2, 4), (1, 4)):
        before = max(checkpoint.steps(workdir / "checkpoints"), default=0)
        launcher = _launch(_arguments(place, workdir), num_hosts, devices)
        _reached(workdir, before + 4, launcher)
        launcher.terminate()
        code, lines = _ended(launcher)
        stopped = max(checkpoint.steps(workdir / "checkpoints"))
        assert code == 0 and before + 4 <= stopped < STEPS, lines
        assert [line for line in lines if "stopped at step" in line] == [
            f"stopped at step {stopped} of {STEPS}, saved; the same command resumes it"
        ]
    train.run(_config(place, "single"), workdir)
    _check_close(workdir, *alone("fsdp"))


@pytest.mark.slow
def test_launch_refuses_a_workdir_in_use_in_one_line(place):
    workdir = place / "taken"
    with train.claimed(workdir):
        code, lines = _ended(_launch(_arguments(place, workdir)))
    assert code == 2
    assert _errors(lines) == [f"error: {workdir} is in use by another run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "other, more, speaker, expected",
    [
        ("here", "seed=1", 0, "the config or corpus of host 0 differs from that of host 1"),
        (
            "there",
            "seed=0",
            1,
            "{place}/there of host 1 is not that of host 0, expected a folder that all hosts share",
        ),
    ],
)
def test_hosts_with_contradicting_arguments_report_them_once(other, more, speaker, expected, place):
    pair = _pair(_arguments(place, place / "here"), _arguments(place, place / other, "fsdp", more))
    ends = [_ended(host) for host in pair]
    assert [code for code, _ in ends] == [2, 2]
    assert _errors(ends[speaker][1]) == [f"error: {expected.format(place=place)}"] and not _errors(
        ends[1 - speaker][1]
    )
    assert not list(place.glob("*here/.shared*"))


@pytest.mark.slow
def test_host_that_fails_alone_reports_why_and_ends_at_once(place):
    """The first host cannot write its log; the second is told that the first is gone."""
    workdir = place / "unwritable"
    workdir.mkdir()
    (workdir / "metrics.jsonl").symlink_to("/nowhere/metrics.jsonl")
    pair = _pair(*[_arguments(place, workdir)] * 2)
    code, lines = _ended(pair[0])
    assert code == 2 and len(_errors(lines)) == 1 and f"{workdir}/metrics.jsonl" in _errors(lines)[0]
    began = time.monotonic()
    assert _ended(pair[1])[0] != 0 and time.monotonic() - began < 10
