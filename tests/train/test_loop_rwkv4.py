"""Whole runs of RWKV-4 with one model and recipe, so that all share one compiled program."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import training
from training import STEPS, losses, numbers, same

import rwkv_jax
from rwkv_jax import checkpoint, train
from rwkv_jax.data import batches
from rwkv_jax.train import divergence, metrics
from rwkv_jax.train.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """(workdir, final state) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    state = train.run(training.config(text), workdir)
    return workdir, jax.device_get(state)


def test_run_leaves_config_log_checkpoints_and_a_loadable_model(finished):
    workdir, state = finished
    config = json.loads((workdir / "config.json").read_text())
    assert config["tokenizer"] == "bytes" and len(config["corpus"]["sha256"]) == 64 and "jax" in config["versions"]
    rows = [r for r in metrics.logged(workdir / "metrics.jsonl") if "loss_nats" in r]
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["loss_nats"] / np.log(2))
        assert {"grad_norm", "lr", "tokens_per_second", "batch_hash", "skipped", "tokens"} <= row.keys()
    assert list(losses(workdir, "valid_loss_nats")) == [3, 6]
    first, last = rows[0]["loss_nats"], rows[-1]["loss_nats"]
    assert first == pytest.approx(np.log(256), rel=0.1) and last < first - 0.3  # it learns
    assert losses(workdir, "valid_loss_nats")[STEPS] == pytest.approx(last, abs=0.3)
    assert checkpoint.steps(workdir / "checkpoints") == [4, 6]
    assert int(state.step) == STEPS
    model, params = rwkv_jax.load(workdir)
    assert model.dim == 32 and same(params, state.params)


def test_resume_is_bit_exact_and_truncates_the_log(finished, text, tmp_path):
    """Dies before row 6 with the checkpoint of step 4: row 5 and a torn row are removed, and both steps are logged
    again."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(training.DiedError):
        training.die_before(patch, lambda row: row["step"] == 6)
        train.run(training.config(text), tmp_path / "run")
    assert list(losses(tmp_path / "run"))[-1] == 5 and checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 4
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss')
    state = train.run(training.config(text), tmp_path / "run")
    assert same(state, finished[1])
    assert numbers(tmp_path / "run") == numbers(finished[0])


def test_run_that_is_done_says_so_and_changes_nothing(finished, text, capsys):
    workdir, before = finished[0], numbers(finished[0])
    assert same(train.run(training.config(text), workdir), finished[1])
    expected = f"step {STEPS} of {STEPS} is done; for more steps, another workdir and --config.branch_from\n"
    assert capsys.readouterr().err == expected
    assert numbers(workdir) == before


# ------------------------------------------------------------------------------------------ divergence


def test_run_ends_after_too_many_steps_that_are_not_finite(finished, text, tmp_path, capsys):
    """The learning rate destroys the parameters in step 1: no later step is finite."""
    lost = {"optim.lr": 1e30, "max_skipped": 2, "save_every": 1}
    assert main(training.arguments(text, tmp_path, **lost)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    expected = "error: steps 2 to 4 are not finite in loss or gradient, max_skipped is 2; the newest checkpoint is of "
    assert re.match(expected + r"step 3; docs/faults\.md ", line), line
    rows = [r for r in metrics.logged(tmp_path / "metrics.jsonl") if "loss_nats" in r]
    assert [(r["step"], r["skipped"], r["loss_nats"] is None) for r in rows] == [
        (1, 0, False), (2, 1, True), (3, 2, True), (4, 3, True)
    ]  # fmt: skip


def test_run_counts_batches_without_a_target_and_continues(finished, tmp_path, capsys):
    rows = [{"prompt": "x" * 2000, "text": f"answer {i}"} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"data.prompt": "prompt", "max_skipped": 1}
    assert main(training.arguments(tmp_path / "text.jsonl", tmp_path / "run", **fields)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "--config.batch_size or --config.seq_len" in line]
    assert len(told) == 1 and "no token of the batch is a target" in told[0]
    rows = [r for r in metrics.logged(tmp_path / "run" / "metrics.jsonl") if "targets" in r]
    assert sum(r["targets"] == 0 for r in rows) == rows[-1]["skipped"] > 2
    assert all((r["targets"] == 0) == (r["loss_nats"] is None) for r in rows)
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run", "valid_loss_nats").values())


def test_run_ends_at_a_leap_of_the_loss_whose_batch_can_be_replayed(finished, text, tmp_path, capsys, monkeypatch):
    """The learning rate grows until the loss leaps; then the code in docs/faults.md fetches the batch of that step."""
    window = 4
    monkeypatch.setattr(divergence, "WINDOW", window)
    wild = {"steps": 30, "optim.lr": 3.0, "optim.warmup": 1.0, "max_loss_rise": 0.5, "save_every": 1, "eval_every": 0}
    assert main(training.arguments(text, tmp_path, **wild)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    rows = [r for r in metrics.logged(tmp_path / "metrics.jsonl") if "loss_nats" in r]
    values = [r["loss_nats"] for r in rows]
    step, rise = rows[-1]["step"], values[-1] - np.mean(values[-1 - window : -1])
    assert f"loss {values[-1]:.3f} of step {step} is {rise:.3f} above the mean of the 4 steps before" in line
    assert all(now - np.mean(values[i : i + window]) <= 0.5 for i, now in enumerate(values[window:-1]))
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == step - 1

    program = re.search("```python\n(.*?)```", (ROOT / "docs" / "faults.md").read_text(), re.S)[1]
    names = {}
    exec(re.sub(r'"runs/\w+", \d+', f'"{tmp_path}", {step}', program), names)
    assert batches.batch_hash(names["batch"]) == rows[-1]["batch_hash"]
    assert names["nll_BT"].mean() == pytest.approx(values[-1], rel=1e-5)


# ------------------------------------------------------------------------------------------ segments


@pytest.mark.slow
def test_run_in_segments_resumes_with_the_carry_of_its_rows(text, tmp_path):
    carried = {"carry_state": True, "segments": 2, "stop_gradient": True, "data": {"order": "documents"}}
    config = lambda: training.config(text, strategy="pmap", eval_tokens=0, **carried)
    whole = train.run(config(), tmp_path / "whole")
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(whole.carry))
    cut = training.copied(tmp_path / "whole", tmp_path / "cut")
    (cut / "checkpoints" / "6" / "manifest.json").unlink()  # as after a kill during this save
    again = train.run(config(), cut)
    assert checkpoint.steps(cut / "checkpoints")[-1] == STEPS
    assert same(whole, again)


def test_train_command_reports_a_model_without_memory_in_one_line(text, tmp_path, capsys):
    assert main(training.arguments(text, tmp_path / "run", **{"model.dim": 2**20})) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: out of memory; raise --config.accumulation, or lower")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
