"""The README files say what the committed results say."""

import importlib
import json
import re
from dataclasses import replace

import pytest

from experiments import command, engineering, ledger


@pytest.mark.parametrize("path", ledger.FILES, ids=lambda path: path.parent.name)
def test_blocks_are_what_the_results_say(path):
    assert ledger.filled(path.read_text()) == path.read_text(), "python -m experiments.ledger rewrites it"
    assert re.search("<!-- end -->", path.read_text())


def test_a_block_is_filled_and_prose_stays(monkeypatch):
    monkeypatch.setitem(ledger.BLOCKS, "hours", lambda: "3.0 hours")
    assert ledger.filled("a\n<!-- hours -->\nold\n<!-- end -->\nb") == "a\n<!-- hours -->\n3.0 hours\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="no block 'minutes', expected one of ledger"):
        ledger.filled("<!-- minutes -->\n<!-- end -->")


def test_every_experiment_has_its_place():
    assert {folder.name for folder in ledger.reproductions()} <= set(ledger.ORDER)


@pytest.mark.parametrize(
    "name, its", ledger.results(), ids=[f"{name} {its['preset']}" for name, its in ledger.results()]
)
def test_committed_conclusions_are_what_the_code_says_of_committed_cells(name, its):
    run = importlib.import_module(f"experiments.{name}.run")
    preset = run.PRESETS[its["preset"]]
    if "text" in its["fields"]:
        preset = replace(preset, text=its["fields"]["text"])
    assert command.fields(preset) == its["fields"]
    conclude = run.conclude if hasattr(run, "conclude") else run.conclusions.conclude
    found = json.loads(json.dumps(conclude(preset, command.bare(its["cells"]))))
    assert (found["ledger"], found.get("not_run")) == (its["ledger"], its.get("not_run"))


def test_what_two_presets_lack_is_told_once():
    rows = ledger.not_run().splitlines()
    assert len(rows) == len(set(rows))


def test_headlines_are_rows_of_the_ledger():
    rows = [row["artefact"] for _, its in ledger.results() for row in its["ledger"]]
    assert [headline for headline in ledger.HEADLINES if headline not in rows] == []


def test_what_a_row_says_in_short_is_part_of_what_it_says():
    numbers = lambda text: set(re.findall(r"\d[\d.,e+-]*\b", text))
    rows = [row for _, its in ledger.results() for row in its["ledger"] if "short" in row]
    assert rows and all(len(row["short"]) < len(row["ours"]) for row in rows)
    assert [row["short"] for row in rows if not numbers(row["short"]) <= numbers(row["ours"])] == []


def test_hardware_of_results_is_that_of_their_cells():
    here = {"processor": "A", "cores": 2, "devices": ["cpu"]}
    cells = {
        "a": here | {"wall_seconds": 60},
        "b": here | {"wall_seconds": 600, "devices": ["H100"]},
        "kept from before cells had it": {"wall_seconds": 60, "devices": ["cpu"]},
    }
    its = {"cells": cells, "stamp": here, "wall_seconds": 720}
    assert ledger.where(its) == ("H100; 2 cores, A", "12 min")


def test_cells_of_a_table_keep_to_their_column():
    assert engineering.table(("a", "b"), [("x|y", "z")]).splitlines()[-1] == r"| x\|y | z |"
