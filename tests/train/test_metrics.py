"""The log of a run: rows that survive a kill, and their copies in TensorBoard and W&B."""

import json
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.train import metrics


def test_append_writes_arrays_as_numbers_and_non_finite_ones_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = {"step": 0, "a": jnp.float32(0.5), "b": np.int64(3), "c": np.float32("nan"), "d": jnp.bool(True)}
    metrics.append(path, first)
    metrics.append(path, {"step": 1, "norm": {"head": np.float32("inf")}, "k_max": [1.0, np.nan], "batch": "é"})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert rows == metrics.logged(path)
    assert rows[0] == {"step": 0, "a": 0.5, "b": 3, "c": None, "d": True}
    assert rows[1] == {"step": 1, "norm": {"head": None}, "k_max": [1.0, None], "batch": "é"}


def test_cut_back_keeps_the_rows_up_to_the_step_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 10,  "x": 1.0}\n', b'{"step": 20, "x": 2e0}\n', b'{"step": 30, "x": 3}\n']
    path.write_bytes(b"".join(lines) + b'{"step": 15, "torn": ')
    assert [row["step"] for row in metrics.logged(path)] == [10, 20, 30]
    metrics.cut_back(path, 20)
    assert path.read_bytes() == lines[0] + lines[1]
    metrics.append(path, {"step": 21})
    assert [row["step"] for row in metrics.logged(path)] == [10, 20, 21]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_logged_names_a_damaged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (b"{broken\n", b"[1]\n", b'{"step": "one"}\n'):
        path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 2"):
            metrics.logged(path)


def test_scalars_names_nested_numbers_by_their_path():
    nested = {"norm": {"head": jnp.float32(0.5)}, "k_max": np.array([1.0, 2.0])}
    row = {"step": 3, "loss": 2.5, "hash": "a", "x": None} | nested
    assert dict(metrics.scalars(row)) == {"loss": 2.5, "norm/head": 0.5, "k_max/0": 1.0, "k_max/1": 2.0}


def test_check_installed_names_a_missing_package_and_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # simulates a missing package
    metrics.check_installed()
    with pytest.raises(ValueError, match=r"logging.wandb_project .*: pip install wandb$"):
        metrics.check_installed(wandb_project="x")


def _events(folder):
    """(step, name, value) as TensorBoard reads them: a restart drops earlier events from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # records: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = [e for e in shown if e[0] < event.step]
            shown += [(event.step, v.tag, round(v.simple_value, 6)) for v in event.summary.value]
    return shown


def test_opened_resumes_tensorboard_at_the_step_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # if torch is installed, tensorboardX imports it for seconds
    row = lambda step: {"step": step, "loss_nats": step / 2, "k_max": [1.0], "batch_hash": "a"}
    with metrics.opened(tmp_path, tensorboard=True) as write:
        for step in (1, 2, 3):
            write(row(step))
    expected = [(s, *x) for s in (1, 2, 3) for x in (("loss_nats", s / 2), ("k_max/0", 1.0))]
    assert _events(tmp_path / "tensorboard") == expected
    metrics.cut_back(tmp_path / "metrics.jsonl", 2)
    with metrics.opened(tmp_path, 2, tensorboard=True) as write:
        write(row(4))
    assert [step for step, name, _ in _events(tmp_path / "tensorboard") if name == "loss_nats"] == [1, 2, 4]
    assert [r["step"] for r in metrics.logged(tmp_path / "metrics.jsonl")] == [1, 2, 4]


@pytest.mark.live
@pytest.mark.filterwarnings("default")  # wandb's dependencies warn
def test_opened_keeps_the_offline_wandb_run_over_a_restart(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 2):
        with metrics.opened(tmp_path, start, {"seed": 7}, wandb_project="rwkv") as write:
            assert wandb.run.project == "rwkv" and wandb.run.config["seed"] == 7
            for step in (1, 2):
                write({"step": start + step, "loss_nats": 0.5, "k_max": [1.0], "batch_hash": "a"})
            assert wandb.run.summary["loss_nats"] == 0.5 and wandb.run.summary["k_max/0"] == 1.0
            assert wandb.run.id == (tmp_path / "wandb_id").read_text()
    wandb.teardown()  # `finish` returns before W&B's own process has closed the file; this waits until it has ended
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.stem for path in files] == [f"run-{(tmp_path / 'wandb_id').read_text()}"] * 2
    assert all(path.stat().st_size > 100 for path in files)
