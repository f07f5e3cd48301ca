"""The experiment on fine-tuning: the pieces of its text, and a smoke run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.finetune import run

ROOT = Path(__file__).parents[2]


def test_finetune_pieces_are_whole_paragraphs_and_cover_the_text():
    paragraphs = ["a" * 3000, "b" * 2000, "c" * 10]
    assert list(run._pieces("\n\n".join(paragraphs))) == ["a" * 3000 + "\n\n" + "b" * 2000 + "\n\n", "c" * 10 + "\n\n"]


@pytest.mark.slow
def test_finetune_smoke_writes_the_table_the_json_and_the_figure(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.finetune.run", "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    trained = {arm: cells[f"{arm}, seed 0"]["trained"] for arm in run.ARMS}
    V, D, L = 256, run.TINY["dim"], run.TINY["num_layers"]
    assert trained["full"] - trained["full, embedding frozen"] == V * D
    assert trained["state"] == 4 * L * D and trained["LoRA, rank 8"] == 4 * trained["LoRA, rank 2"]
    assert "minus none" in done.stdout and (tmp_path / "figure.png").stat().st_size > 10_000
