"""`python -m rwkv_jax.train`: a mistake is one line and exit code 2, before the workdir is touched."""

import pytest
import training

from rwkv_jax.train import run_config
from rwkv_jax.train.__main__ import main


@pytest.mark.parametrize(
    "changes, stray, expected",
    [
        ({"corpus": "/nowhere/text"}, [], "/nowhere/text"),
        ({"seq_len": 200_000}, [], "shorter than one window of 200001"),
        ({"optim.warmpu": 3}, [], 'Did you mean "warmup" instead of "warmpu"?'),
        ({"steps": "many"}, [], "config.steps=many"),
        ({"data": {"text": "body"}}, [], "no field 'data.order'; start from run_config.default()"),
        ({"model.name": "rwkv44"}, [], "unknown model name 'rwkv44': did you mean 'rwkv4'?"),
        ({"optim.schedule": "linear"}, [], "schedule is 'linear', expected exponential"),
        ({}, ["steps=3"], "unexpected argument 'steps=3'"),
        ({}, ["--num_hosts=2"], "--coordinator and --host missing"),
        ({}, ["--profile=3:3"], "--profile is '3:3', expected FIRST:END"),
    ],
)
def test_train_command_reports_mistakes_in_one_line(changes, stray, expected, toy, text, tmp_path, capsys):
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
        ("from ml_collections import ConfigDict as C\ndef get_config(arg): return C({'steps': 3})", "no field"),
    ],
)
def test_train_command_reports_a_config_file_without_a_config(program, expected, tmp_path, capsys):
    (tmp_path / "config.py").write_text(program)
    assert main([f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.py: " in err and expected in err
    assert not (tmp_path / "run").exists()


def test_train_command_accepts_a_config_path_with_colons(tmp_path):
    program = (
        "def get_config(arg):\n    config = run_config.default()\n    config.corpus = arg or 'none'\n    return config"
    )
    for name in ("a.py", "a:b.py", "a.py:b"):
        (tmp_path / name).write_text(f"from rwkv_jax.train import run_config\n{program}")
        assert run_config.read(str(tmp_path / name)).corpus == "none"
        assert run_config.read(f"{tmp_path / name}:c:d").corpus == "c:d"
