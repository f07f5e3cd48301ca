"""The precision experiment: its float64 reference against Eq. 16 written out, and a short run of the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from wkv4_formula import Past, formula

from experiments.precision import judge, run, table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("T", [1, 100])
def test_judge_computes_eq_16_and_its_gradients(T):
    w, u, k, v, dy = run.inputs(T, "float32")
    actual = judge.exact(w, u, k, v, dy)
    nothing = Past(np.zeros((1, len(w))), np.full((1, len(w)), -np.inf))
    want = formula(w, u, k[None], v[None], nothing, dy[None])
    for name, (value, magnitude) in actual.items():
        scale = want[name].magnitude[0] + np.finfo(np.float32).tiny
        np.testing.assert_array_less(abs(value - want[name].value[0]) / scale, 2e-12, err_msg=name)
        np.testing.assert_array_less(abs(magnitude - want[name].magnitude[0]) / scale, 2e-12, err_msg=name)


def test_compare_matches_errors_computed_by_hand():
    value = np.tile([3.0, 4.0], (len(run.CHANNELS), 1)).T  # [2 tokens, channels], rms sqrt(12.5)
    magnitude, wrong = 2 * value, value.copy()
    wrong[:, 5] += [0.5, -0.5]
    value[:, 7] = wrong[:, 7] = 0  # exactly zero: not counted
    errors = run.compare({"k": wrong}, {"k": (value, magnitude)})["k"]
    assert errors["worst"] == pytest.approx(0.5 / np.sqrt(12.5)) and errors["worst_channel"] == run.CHANNELS[5]
    assert errors["rms"] == pytest.approx(errors["worst"] / np.sqrt(len(run.CHANNELS) - 1))
    assert errors["worst_of_magnitude"] == pytest.approx(errors["worst"] / 2)
    assert run.compare({"k": 0 * wrong}, {"k": (0 * value, magnitude)})["k"]["worst"] is None


@pytest.mark.slow
@pytest.mark.live
def test_precision_smoke_writes_the_tables_the_json_and_the_figure(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.precision.run", "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["dtype"], row["T"], row["side"]): row for row in results["rows"]}
    for dtype in run.DTYPES:
        for form in results["steps"]:
            assert rows[dtype, 17, form]["errors"]["y"]["worst"] < (1e-6 if dtype == "float32" else 4e-3)
    assert {what.split(":")[0] for what, _, _ in results["claims"]} == {
        f"{form}, {dtype}" for form in results["steps"] for dtype in run.DTYPES
    }
    assert rows["float32", 17, "transformers"]["errors"]["y"]["worst"] > 1e-5
    assert table.render(results) in done.stdout
    assert (tmp_path / "figure.png").stat().st_size > 10_000
