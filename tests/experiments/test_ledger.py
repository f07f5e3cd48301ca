"""The README files and the committed conclusions match those computed from the committed results."""

import importlib
import json
import re
import types
from dataclasses import replace

import pytest

from experiments import answers, command, engineering, ledger, study
from rwkv_jax.files import to_json

NO_NUMBER = ("none", "no number", "no such arm", "not in the paper")
SLOW = {"scaling"}  # seconds of bootstrap


@pytest.mark.parametrize("path", ledger.FILES, ids=lambda path: path.parent.name)
def test_ledger_blocks_of_readmes_equal_the_committed_results(path):
    assert ledger.filled(path.read_text()) == path.read_text(), "python -m experiments.ledger rewrites it"
    assert re.search("<!-- end -->", path.read_text())


def test_ledger_filled_replaces_a_block_and_keeps_prose(monkeypatch):
    monkeypatch.setitem(ledger.BLOCKS, "hours", lambda: engineering.table(("a",), [("x|y",)]))
    table = "| a |\n| --- |\n| x\\|y |"
    assert ledger.filled("a\n<!-- hours -->\nold\n<!-- end -->\nb") == f"a\n<!-- hours -->\n{table}\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="no block 'minutes', expected one of claims"):
        ledger.filled("<!-- minutes -->\n<!-- end -->")


@pytest.mark.parametrize(
    "name, its",
    [
        pytest.param(name, its, id=f"{name} {its['preset']}", marks=[pytest.mark.slow] if name in SLOW else [])
        for name, its in ledger.results()
    ],
)
def test_conclude_reproduces_committed_conclusions_from_committed_cells(name, its):
    """Also tables and intervals of studies, to nine digits."""
    run = importlib.import_module(f"experiments.{name}.run")
    conclude = run.conclude if hasattr(run, "conclude") else run.conclusions.conclude
    if "study" in its:
        about = study.Study(**its["study"], conclude=conclude)
        found = study.concluded(about, its["preset"], its["cells"])
    else:
        about = run.PRESETS[its["preset"]]
        if "text" in its["fields"]:
            about = replace(about, text=its["fields"]["text"])
        assert command.fields(about) == its["fields"]
        found = conclude(about, command.bare(its["cells"]))
    rounded = lambda value: json.loads(to_json(value), parse_float=lambda x: f"{float(x):.9g}")
    assert rounded(found) == rounded({name: its.get(name) for name in found})


def test_answers_take_the_largest_budget_that_all_pairs_have():
    row = lambda value, seeds=2: {"difference": value, "low": value - 0.01, "high": value + 0.01, "seeds": seeds}
    pairs = {"a minus b": {"9000000": row(0.1), "10000000": row(0.2), "20000000": row(0.3)}}
    pairs |= {"c minus b": {"9000000": row(0.4), "10000000": row(0.5, seeds=1)}}
    found = answers.at_common_budget(pairs, {"ab": "a minus b", "cb": "c minus b"})
    assert found == ("10000000", 1, {"ab": "+0.200 [+0.190, +0.210]", "cb": "+0.500 [+0.490, +0.510]"})


def test_ledger_is_complete_with_short_and_consistent_rows():
    assert {folder.name for folder in ledger.reproductions()} <= set(ledger.ORDER)
    rows = [row for _, its in ledger.results() for row in its["ledger"]]
    assert set(ledger.FIRST) <= {row["artefact"] for row in rows} and len(ledger.FIRST) <= 24
    assert [row["ours"] for row in rows if len(row["ours"]) > 105] == []
    assert [row for row in rows if row["paper"] in NO_NUMBER and row["verdict"] != "no claim"] == []
    of_cpu = [
        its["wall_seconds"] for name, its in ledger.results() if its["preset"] == "cpu" and name not in ledger.LONG
    ]
    assert sum(of_cpu) < 2 * 3600  # the promise of `make reproduce`
    listed = ledger.not_run().splitlines()
    assert len(listed) == len(set(listed))


def test_ledger_where_reports_the_hardware_of_the_cells():
    here = {"processor": "A", "cores": 2, "devices": ["cpu"]}
    cells = {
        "a": here | {"wall_seconds": 60},
        "b": here | {"wall_seconds": 600, "devices": ["H100"]},
        "kept from before cells had it": {"wall_seconds": 60, "devices": ["cpu"]},
    }
    its = {"cells": cells, "stamp": here, "wall_seconds": 720}
    assert ledger.where(its) == ("H100; 2 cores, A", "12 min")


def test_ledger_run_names_failed_experiments_and_ends_with_an_error(monkeypatch, tmp_path, capsys):
    codes, ran = {"a": 0, "b": 2, "c": 0}, []

    def run(program):
        name = program[2].split(".")[1]
        ran.append(name)
        assert program[3:] == ["--publish"] * (name == "c")
        return types.SimpleNamespace(returncode=codes[name])

    for name in codes:
        (tmp_path / name).mkdir()
        of_study = "from experiments import statistics, study\nstudy.main(**STUDY)"
        (tmp_path / name / "run.py").write_text(of_study if name == "c" else "from experiments import command")
    monkeypatch.setattr(ledger, "reproductions", lambda: [tmp_path / name for name in codes])
    monkeypatch.setattr(ledger.subprocess, "run", run)
    monkeypatch.setattr(ledger, "FILES", ())
    assert ledger.main(["--run"]) == 2 and ran == list(codes)
    assert capsys.readouterr().err.startswith("error: failed: b; ")
    codes["b"] = 130  # an interrupt by the user ends the whole run
    ran.clear()
    assert ledger.main(["--run"]) == 130 and ran == ["a", "b"]
