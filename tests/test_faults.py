"""What can go wrong with a run from outside, and what is left of it: the table of docs/faults.md, row by row."""

import json

import jax
import numpy as np
import pytest
from test_train import _config, _DiedError, _same, _tiny

from rwkv_jax import metrics, train
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
