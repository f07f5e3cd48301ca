"""The precision experiment: its float64 reference against Eq. 16 written out, and a short run of the command."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from judge import assert_same
from wkv4_formula import Past, formula

from experiments.precision import judge, judge_matrices, matrices, run, table, vectors
from experiments.precision.operators import OPERATORS
from rwkv_jax.ops import wkv6, wkv7

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("T", [1, 100])
def test_precision_judge_computes_eq_16_and_its_gradients(T):
    w, u, k, v, dy = vectors.inputs(T, "float32")
    actual = judge.exact(w, u, k, v, dy)
    nothing = Past(np.zeros((1, len(w))), np.full((1, len(w)), -np.inf))
    want = formula(w, u, k[None], v[None], nothing, dy[None])
    for name, (value, magnitude) in actual.items():
        scale = want[name].magnitude[0] + np.finfo(np.float32).tiny
        np.testing.assert_array_less(abs(value - want[name].value[0]) / scale, 2e-12, err_msg=name)
        np.testing.assert_array_less(abs(magnitude - want[name].magnitude[0]) / scale, 2e-12, err_msg=name)


@pytest.mark.parametrize("name", ["WKV-5", "WKV-6", "WKV-7"])
def test_judge_matrices_agrees_with_the_operator_in_float64(name, x64, monkeypatch):
    """Covers several spans of tokens, with gradients to the initial state and from the final one."""
    monkeypatch.setattr(judge_matrices, "SPAN", 6)
    given = OPERATORS[name].inputs(17, "float32")
    op, names = (wkv7, "rwkvab") if name == "WKV-7" else (wkv6, "rwkvu")
    want = jax.device_get(matrices.results(op, "scan", names, *(np.float64(x) for x in given)))
    actual = OPERATORS[name].exact(*given)
    assert_same({quantity: value for quantity, (value, _) in actual.items()}, want, 1e-13)
    for quantity, (value, magnitude) in actual.items():
        assert (abs(value) <= (1 + 1e-12) * magnitude).all(), quantity


def test_exact6_magnitude_is_the_sum_of_absolute_terms():
    given = matrices.inputs6(5, "float32")
    r, w, k, v, u, state = (np.float64(x)[..., 0] for x in given[:6])
    past = np.exp(w[:4].sum(0))[:, None] * abs(state)
    past += sum(np.exp(w[i + 1 : 4].sum(0))[:, None] * abs(np.outer(k[i], v[i])) for i in range(4))
    want = abs(r[4]) @ past + abs(r[4] * u * k[4]).sum() * abs(v[4])
    np.testing.assert_allclose(judge_matrices.exact6(*given)["y"][1][4, :, 0], want, rtol=1e-12)


def test_exact7_magnitude_is_the_largest_of_a_head():
    given = matrices.inputs7(1, "float32")
    r, w, k, v, a, b, state, dy, dstate = (np.float64(x[..., 0]) for x in given)
    now = np.exp(w[0])[:, None] * state + np.outer(b[0], a[0] @ state) + np.outer(k[0], v[0])
    ds = dstate + np.outer(r[0], dy[0])
    found = judge_matrices.exact7(*given)
    for name, want in {"y": abs(r[0]) @ abs(now), "k": abs(ds) @ abs(v[0]), "v": abs(k[0]) @ abs(ds)}.items():
        np.testing.assert_allclose(found[name][1][..., 0], want.max(), rtol=1e-12)


def test_precision_compare_matches_errors_by_hand():
    operator = OPERATORS["WKV-4"]
    value = np.tile([3.0, 4.0], (len(operator.channels), 1)).T  # [2 tokens, channels], rms sqrt(12.5)
    magnitude, wrong = 2 * value, value.copy()
    wrong[:, 5] += [0.5, -0.5]
    value[:, 7] = wrong[:, 7] = 0  # exactly zero: left out of the statistics
    errors = run.compare(operator, {"k": wrong}, {"k": (value, magnitude)})["k"]
    assert errors["worst"] == pytest.approx(0.5 / np.sqrt(12.5)) and errors["worst_channel"] == operator.channels[5]
    assert errors["rms"] == pytest.approx(errors["worst"] / np.sqrt(len(operator.channels) - 1))
    assert errors["worst_of_magnitude"] == pytest.approx(errors["worst"] / 2)
    assert run.compare(operator, {"k": 0 * wrong}, {"k": (0 * value, magnitude)})["k"]["worst"] is None


def test_precision_claims_fail_for_an_error_that_is_nan():
    rows = [{"operator": "WKV-7", "side": "scan", "dtype": "float32", "share_of_bound": {"y": 0.1, "w": np.nan}}]
    ((_, measured, most),) = run.claims(rows)
    assert not measured <= most


@pytest.mark.slow
@pytest.mark.live
def test_precision_smoke_writes_the_tables_the_json_and_the_figure(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.precision.run", "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["operator"], row["dtype"], row["T"], row["side"]): row for row in results["rows"]}
    cases = [(name, form, dtype) for name, x in OPERATORS.items() for form in x.steps for dtype in run.DTYPES]
    for name, form, dtype in cases:
        assert rows[name, dtype, 17, form]["errors"]["y"]["worst"] < (1e-6 if dtype == "float32" else 4e-3)
    assert [what.split(":")[0] for what, _, _ in results["claims"]] == [
        f"{name}, {form}, {dtype}" for name, x in OPERATORS.items() for dtype in run.DTYPES for form in x.steps
    ]
    assert rows["WKV-4", "float32", 17, "transformers"]["errors"]["y"]["worst"] > 1e-5
    assert table.render(results) in done.stdout
    assert (tmp_path / "figure.png").stat().st_size > 10_000
