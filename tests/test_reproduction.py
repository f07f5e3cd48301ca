"""Every experiment of the paper runs with `--smoke` and writes the results that the ledger needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import command, ledger

ROOT = Path(__file__).parents[1]
NAMES = [folder.name for folder in ledger.reproductions()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_of_every_experiment_writes_results_for_the_ledger(name, tmp_path):
    program = [sys.executable, "-W", "error", "-m", f"experiments.{name}.run", "--smoke", f"--out={tmp_path}"]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["preset"] == "smoke" and results["stamp"]["command"].startswith(f"python -m experiments.{name}.run")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert results["ledger"] and all(row["verdict"] in command.VERDICTS for row in results["ledger"])
    for row in results.get("not_run", []):
        assert row.keys() == {"artefact", "command", "hardware", "hours", "why"}
    assert json.dumps(results).isascii()
