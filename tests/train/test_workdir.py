"""Workdirs: they accept their own run again, one run at a time and undamaged files; branches of a trunk."""

import json

import jax
import numpy as np
import pytest
import training
from training import numbers, same

from rwkv_jax import checkpoint, train
from rwkv_jax.train.__main__ import main

pytestmark = pytest.mark.usefixtures("toy")


def test_claimed_admits_one_run_at_a_time(text, tmp_path):
    with train.claimed(tmp_path), pytest.raises(ValueError, match="is in use by another run"):
        train.run(training.config(text), tmp_path)


def test_run_that_fails_to_start_leaves_its_workdir_unclaimed(runs, text, tmp_path):
    config = training.config(text)
    config.branch_from = "nothing"
    with pytest.raises(ValueError, match="branch_from is 'nothing'"):
        train.run(config, tmp_path)
    config.branch_from = ""
    assert same(train.run(config, tmp_path), runs.state)


def test_run_names_the_fields_of_a_workdir_of_another_config(runs, text):
    config = training.config(text)
    config.model.dim, config.steps = 64, 7
    with pytest.raises(ValueError, match=r"run of another config: model\.dim was 32, now 64; steps was 6, now 7$"):
        train.run(config, runs.whole)


def test_run_resumes_an_older_workdir_with_the_defaults_of_new_fields(half, runs, text):
    record = json.loads((half / "config.json").read_text())
    del record["config"]["strategy"], record["config"]["optim"]["l2wrap"], record["config"]["model"]["dropout"]
    record["config"]["model"]["embedding_init"] = "v4neo"  # None since kinds have defaults of their own
    (half / "config.json").write_text(json.dumps(record))
    assert same(train.run(training.config(text), half), runs.state)
    config = training.config(text)
    config.optim.l2wrap = False
    with pytest.raises(ValueError, match=r"run of another config: optim\.l2wrap was True, now False$"):
        train.run(config, half)


@pytest.mark.parametrize(
    "file, damage",
    [
        ("config.json", lambda content: content[:-9]),
        ("config.json", lambda content: b'{"config": 3}'),
        ("metrics.jsonl", lambda content: b'{"step": 1, "train_seconds": "x"}\n' + content),
        ("metrics.jsonl", lambda content: b"{\n" + content),
    ],
)
def test_run_names_a_damaged_file_and_leaves_the_workdir_unchanged(file, damage, half, text, capsys):
    (half / file).write_bytes(damage((half / file).read_bytes()))
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert main(training.arguments(text, half)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {half}/{file}") and line.count("\n") == 1, line
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


def test_run_reports_a_damaged_checkpoint_and_resumes_from_the_previous(runs, text, tmp_path, capsys):
    workdir = training.copied(runs.whole, tmp_path / "run")
    (workdir / "checkpoints" / "6" / "_METADATA").write_bytes(b"{}")
    again = train.run(training.config(text), workdir)
    assert "damaged checkpoint" in capsys.readouterr().err
    assert same(again, runs.state) and numbers(workdir) == numbers(runs.whole)


# ------------------------------------------------------------------------------------------ branches


def test_branch_starts_from_the_state_of_its_trunk(runs, text, tmp_path):
    trunk = runs.whole / "checkpoints" / "4"
    state = train.run(training.config(text, branch_from=str(trunk)), tmp_path)
    assert [r["step"] for r in numbers(tmp_path) if "loss_nats" in r] == [5, 6]
    assert same(state, runs.state)  # the same schedule, hence the same end


def test_branch_is_refused_unless_it_is_longer_than_its_trunk(runs, text, tmp_path):
    config = training.config(text, branch_from=str(runs.whole / "checkpoints" / "6"))
    with pytest.raises(ValueError, match="steps is 6, expected more than the 6 of branch_from"):
        train.run(config, tmp_path)


def test_branch_begins_with_an_empty_carry_of_its_own_batch_size(text, tmp_path):
    carried = {"carry_state": True, "data": {"order": "documents"}, "save_every": 1}
    train.run(training.config(text, steps=4, **carried), tmp_path / "trunk")
    trunk = str(tmp_path / "trunk" / "checkpoints" / "4")
    more = {"steps": 5, "batch_size": 2, "seq_len": 32, "branch_from": trunk}
    state = train.run(training.config(text, **carried, **more), tmp_path / "branch")
    (carry,) = jax.device_get(state.carry)
    assert len(carry) == 2 and np.array_equal(carry, np.round(carry)) and carry.any()  # after one step: whole numbers
    plain = training.config(text, **carried | {"carry_state": False, "steps": 5, "branch_from": trunk})
    assert train.run(plain, tmp_path / "plain").carry is None
    assert checkpoint.steps(tmp_path / "plain" / "checkpoints") == [5]
