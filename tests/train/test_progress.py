"""The time of a run by part, and its progress line."""

import itertools
import time

from rwkv_jax.train import progress


def test_clock_resumes_from_a_log_without_lost_seconds(monkeypatch):
    """Workdirs of older versions have the training time alone."""
    clock = progress.Clock([{"step": 10, "train_seconds": 5.0}, {"step": 20, "train_seconds": 9.0}], 10, 1000.0)
    monkeypatch.setattr(time, "time", lambda: 1001.0)
    clock.lap("startup")
    row = clock.row()
    assert row["wall_seconds"] == 10.0 and row["train_seconds"] == 5.0 and row["goodput"] == 0.5
    assert {part: s for part, s in row["lost_seconds"].items() if s} == {"redone": 4.0, "startup": 1.0}


def test_shown_prints_a_line_every_ten_seconds_without_a_terminal(monkeypatch, capsys):
    clock = itertools.count(0, 1.0)  # one second for each step
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.shown(100, 135) as show:
        for step in range(101, 136):
            show(step, f"loss {step / 100:.2f}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == ["110", "120", "130", "135"]
    assert lines[1] == "120/135 steps [00:19<00:15,  1.00step/s, loss 1.20]"
