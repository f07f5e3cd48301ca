"""The experiment on state tracking: its words against permutation matrices, its training, and its verdicts."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import study
from experiments.tracking import run
from experiments.tracking.words import letters, permutations, product_table, words

ROOT = Path(__file__).parents[2]


def _matrices(group):
    """[G, points, points]: row i of an element's matrix marks the image of point i."""
    return np.eye(permutations(group).shape[1], dtype=int)[permutations(group)]


@pytest.mark.parametrize(("group", "order", "commutes"), [("S3", 6, False), ("Z6", 6, True), ("A5", 60, False)])
def test_product_table_agrees_with_products_of_permutation_matrices(group, order, commutes):
    table, matrices_GPP = product_table(group), _matrices(group)
    assert table.shape == (order, order) and len(np.unique(matrices_GPP, axis=0)) == order
    np.testing.assert_array_equal(matrices_GPP[table], matrices_GPP[:, None] @ matrices_GPP[None])
    np.testing.assert_array_equal(table[0], np.arange(order))  # the identity
    assert (table == table.T).all() == commutes
    assert group != "A5" or (np.linalg.det(matrices_GPP) > 0).all()
    reached = set(letters(group))
    while (more := reached | set(table[np.ix_(list(reached), letters(group))].flat)) != reached:
        reached = more
    assert len(reached) == order and len(letters(group)) == (2 if group == "A5" else order)


def test_words_have_the_product_so_far_as_target():
    batch, again, other = (words(np.random.default_rng(seed), 16, 9, "A5") for seed in (0, 0, 1))
    matrices_GPP = _matrices("A5")
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        products = [functools.reduce(np.matmul, matrices_GPP[tokens[: t + 1]]) for t in range(9)]
        np.testing.assert_array_equal(matrices_GPP[targets], products)
    assert batch["tokens"].shape == (16, 10) and batch["tokens"].dtype == np.int32 and batch["mask"].all()
    assert (again["tokens"] == batch["tokens"]).all() and (other["tokens"] != batch["tokens"]).any()
    many = words(np.random.default_rng(2), 2000, 3, "S3")["targets"][:, -1]
    np.testing.assert_allclose(np.bincount(many) / 2000, 1 / 6, atol=0.03)  # chance is one in G at every position
    with pytest.raises(ValueError, match="unknown group 'S4'"):
        words(np.random.default_rng(0), 1, 2, "S4")


@pytest.mark.parametrize(
    ("high", "low", "verdict"),
    [
        ([0.9, 0.91, 0.92], [0.5, 0.52, 0.5], "same sign"),
        ([0.5, 0.52, 0.5], [0.9, 0.91, 0.92], "contradicted"),
        ([0.9, 0.2, 0.9], [0.5, 0.6, 0.5], "not resolved"),
        ([0.3, 0.31, 0.32], [0.1, 0.1, 0.11], "not comparable"),  # neither has learned the task
    ],
)
def test_tracking_judged_needs_an_interval_and_a_learned_task(high, low, verdict):
    assert run.judged(high, low) == verdict


def test_tracking_conclude_compares_pairs_at_their_lengths():
    its = study.Study(**run.STUDY)
    values = {}
    for i, arm in enumerate(study.arms_of(its)):
        ramp_T = np.linspace(1, 0.6, 64) - i / 100  # differs by arm
        values |= {study.name_of(arm, seed): {"right": (ramp_T * (1 + seed / 100)).tolist()} for seed in range(3)}
    results = run.conclude(its, values)
    rows = {row["artefact"]: row for row in results["ledger"]}
    name = "State tracking, S3: rwkv7 (removal 2) minus rwkv7, token 32 (trained on 16)"
    seven, twice = (values[study.name_of(f"S3 x 2, {x}", 0)]["right"] for x in ("rwkv7", "rwkv7 (removal 2)"))
    assert rows[name]["ours"].startswith(f"{1.01 * (twice[31] - seven[31]):+.3f} [")
    order = list(study.arms_of(its)).index("A5 x 2, rwkv7")
    four_times = (0.6 - order / 100) * np.array([1, 1.01, 1.02])
    np.testing.assert_allclose(results["last_token"]["A5 x 2, rwkv7"]["64"], four_times)
    assert results["chance"]["A5"] == 1 / 60
    # rows that the papers lack have no verdict
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts.pop("State tracking, A5: rwkv7 minus transformer, token 16 (trained on 16)") == "same sign"
    assert set(verdicts.values()) == {"no claim"}


def test_tracking_conclude_of_the_long_preset_compares_versions_on_s3():
    its = study.chosen(study.Study(**run.STUDY), "long")
    right = dict(zip(study.arms_of(its), (0.2, 0.3, 0.8, 1.0), strict=True))
    values = {study.name_of(arm, seed): {"right": [right[arm]] * 64} for arm in right for seed in range(3)}
    rows = run.conclude(its, values)["ledger"]
    assert [row["ours"][:6] for row in rows] == ["+0.100", "+0.500", "+0.200", "+0.200"]
    told = "2 layers, 3 seeds, 192,000 words"
    assert [row["run"] for row in rows] == [f"{told}, neither learned it", told, told, told]


@pytest.mark.slow
def test_tracking_smoke_writes_the_json_and_the_figure(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.tracking.run", "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    right = {name: len(cell["right"]) for name, cell in cells.items()}
    assert len(right) == 2 * 7 and set(right.values()) == {run.LONGEST * 4}
    assert (tmp_path / "figure.png").stat().st_size > 10_000
