"""The speed benchmark runs whole, small; its numbers mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.live
def test_smoke_measures_every_suite_and_keeps_the_others(tmp_path):
    command = [sys.executable, "-m", "experiments.speed.run", "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"train", "decode", "ops"}
    assert results["decode"]["rows"][0]["same_tokens"]
    assert {row["form"] for row in results["ops"]["rows"]} >= {"scan", "associative", "transformers"}
    assert all(row["seconds"] > 0 for row in results["ops"]["rows"])
