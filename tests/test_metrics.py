import json

import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import metrics


def test_rows_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "loss_nats": 5.5, "batch": "a1"}, {"step": 10, "loss_nats": 0.1, "batch": "é"}]
    for row in rows:
        metrics.append(path, row)
    assert metrics.read(path) == rows
    assert len(path.read_bytes().splitlines()) == 2


def test_array_scalars_are_numbers_and_non_finite_ones_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"a": jnp.float32(0.5), "b": np.int64(3), "c": np.float32("nan"), "d": -np.inf, "e": jnp.bool(True)}
    metrics.append(path, row)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": 0.5,
        "b": 3,
        "c": None,
        "d": None,
        "e": True,
    }


def test_cut_back_keeps_the_rows_up_to_the_step_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 10,  "x": 1.0}\n', b'{"step": 20, "x": 2e0}\n', b'{"step": 30, "x": 3}\n']
    path.write_bytes(b"".join(lines) + b'{"step": 15, "torn": ')
    assert [row["step"] for row in metrics.read(path)] == [10, 20, 30]
    metrics.cut_back(path, 20)
    assert path.read_bytes() == lines[0] + lines[1]
    metrics.append(path, {"step": 21})
    assert [row["step"] for row in metrics.read(path)] == [10, 20, 21]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_back_of_a_new_run_makes_no_file(tmp_path):
    metrics.cut_back(tmp_path / "metrics.jsonl", 0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b"\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 "):
        metrics.read(path)
