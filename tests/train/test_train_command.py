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

MISTAKES = {
    "missing corpus": ({"corpus": "/nowhere/text"}, "/nowhere/text"),
    "empty corpus": ({"corpus": "{empty}"}, "empty"),
    "corpus shorter than a window": ({"corpus": "{short}", "seq_len": 512}, "shorter than one window of 513"),
    "misspelt field": ({"optim.warmpu": 3}, 'Did you mean "warmup" instead of "warmpu"?'),
    "misspelt section": ({"optm.lr": 3}, 'Did you mean "optim"'),
    "value of another type": ({"steps": "many"}, "config.steps=many"),
    "unknown model": ({"model.name": "rwkv5"}, "unknown model name 'rwkv5': did you mean 'rwkv4'?"),
    "unknown schedule": ({"optim.schedule": "linear"}, "schedule is 'linear', expected exponential"),
    "batch over accumulation": ({"accumulation": 3}, "batch_size is 4, expected a multiple of 3"),
    "stray argument": ({}, "unexpected argument 'steps=3'"),
}


def mistaken(mistake, text, folder):
    """The arguments of a mistake, and what its line says."""
    changes, expected = MISTAKES[mistake]
    (folder / "empty").write_text("")
    (folder / "short").write_text("a few words\n" * 20)
    places = {name: folder / name for name in ("empty", "short")}
    changes = {field: str(value).format(**places) for field, value in changes.items()}
    stray = ["steps=3"] if mistake == "stray argument" else []
    return [*training.arguments(text, folder / "run", **changes), *stray], expected


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(mistake, toy, text, tmp_path, capsys):
    arguments, expected = mistaken(mistake, text, tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and expected in lines[-1]
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["missing corpus", "misspelt field", "stray argument"])
def test_mistake_in_a_process_of_its_own_ends_without_a_traceback(mistake, text, tmp_path):
    arguments, expected = mistaken(mistake, text, tmp_path)
    done = subprocess.run(_command(arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
    assert expected in lines[0]


@pytest.mark.parametrize(
    "program, expected",
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "KeyError: 'get_config'"),
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
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits_with_code_0(signum, text, tmp_path):
    long = {"steps": 60, "save_every": 5, "optim.warmup": 0.0}
    command = _command(training.arguments(text, tmp_path, **long))
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "metrics.jsonl", 3, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    stopped = max(checkpoint.steps(tmp_path / "checkpoints"))
    assert f"stopped at step {stopped} of 60" in err and stopped < 60
