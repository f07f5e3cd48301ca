"""python -m rwkv_jax.train: a mistake is one line and exit code 2, a signal saves and ends the run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training

from rwkv_jax import checkpoint
from rwkv_jax.train import metrics
from rwkv_jax.train.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "changes, stray, expected",
    [
        ({"corpus": "/nowhere/text"}, [], "/nowhere/text"),
        ({"seq_len": 200_000}, [], "shorter than one window of 200001"),
        ({"optim.warmpu": 3}, [], 'Did you mean "warmup" instead of "warmpu"?'),
        ({"steps": "many"}, [], "config.steps=many"),
        ({"model.name": "rwkv5"}, [], "unknown model name 'rwkv5': did you mean 'rwkv4'?"),
        ({"optim.schedule": "linear"}, [], "schedule is 'linear', expected exponential"),
        ({}, ["steps=3"], "unexpected argument 'steps=3'"),
        ({}, ["--num_hosts=2"], "--coordinator and --host missing"),
        ({}, ["--profile=3:3"], "--profile is '3:3', expected FIRST:END"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(changes, stray, expected, toy, text, tmp_path, capsys):
    assert main([*training.arguments(text, tmp_path / "run", **changes), *stray]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and expected in lines[-1]
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "program, expected",
    [
        ("def get_config(:", "SyntaxError"),
        ("def get_config(arg): return {}", "get_config returned dict, expected a ConfigDict"),
        ("import nowhere", "ModuleNotFoundError"),
    ],
)
def test_config_file_that_has_no_config_is_one_line(program, expected, tmp_path, capsys):
    (tmp_path / "config.py").write_text(program)
    assert main([f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.py: " in err and expected in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mistake_in_a_process_of_its_own_ends_without_a_traceback(text, tmp_path):
    command = _command(training.arguments(text, tmp_path / "run", **{"optim.warmpu": 3}))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: unknown config field")
    assert "Traceback" not in done.stderr


def _command(arguments):
    return [sys.executable, "-W", "error", "-m", "rwkv_jax.train", *arguments]


def _wait_for(path, step, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(r["step"] >= step for r in metrics.logged(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.slow
def test_signal_saves_and_exits_with_code_0(text, tmp_path):
    long = {"steps": 60, "save_every": 5, "optim.warmup": 0.0}
    command = _command(training.arguments(text, tmp_path, **long))
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    stopped = max(checkpoint.steps(tmp_path / "checkpoints"))
    assert f"stopped at step {stopped} of 60" in err and stopped < 60
