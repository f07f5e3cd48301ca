"""Trains like the original, step for step: 150 steps of the released trainer in float64; a clone of it, run here."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.trajectory import run
from rwkv_jax.ops import wkv4

ROOT = Path(__file__).parents[1]


def test_every_step_and_the_final_tensors_are_the_released_trainers():
    found = run.apart(run.ours(150), run.kept(150))
    assert len(found["loss_by_step"]) == 150
    for what in ("loss_nats", "grad_norm_relative", "final_tensors"):  # the file holds the tensors as float32
        assert found[what] < 1e-6, what


def test_the_distance_of_trajectories_is_the_largest_of_every_kind():
    a = np.array([1.0, 2.0]), np.array([4.0, 4.0]), {"x": np.array([1.0, 5.0])}
    b = np.array([1.5, 2.0]), np.array([4.0, 5.0]), {"x": np.array([1.0, 4.0])}
    found = run.apart(a, b)
    assert found.pop("loss_by_step") == [0.5, 0.0]
    assert found == pytest.approx({"loss_nats": 0.5, "grad_norm_relative": 0.2, "final_tensors": 1.0})
    assert "final_tensors" not in run.apart(a, (*b[:2], None))


def test_one_number_out_of_place_is_a_contradiction():
    cell = {"from kept": {"loss_nats": 1e-8, "grad_norm_relative": 1e-8, "loss_by_step": [1e-8]}}
    values = {name: cell for name in run.CELLS} | {"clone, model.py 123": {"from clone": cell["from kept"]}}
    verdict = lambda: run.conclude(run.PRESETS["smoke"], values)["ledger"][0]["verdict"]
    assert verdict() == "reproduced"
    values["clone, model.py 123"] = {"from clone": cell["from kept"] | {"grad_norm_relative": 1e-5}}
    assert verdict() == "contradicted"


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"l2wrap": False}, {"groups": ()}])
def test_the_proof_notices_a_missing_piece(change):
    assert run.apart(run.ours(30, **change), run.kept(30))["loss_nats"] > 1e-5


def _clone(folder, program):
    path = folder / "RWKV-v4neo" / "src" / "model.py"
    path.parent.mkdir(parents=True)
    path.write_text(program)
    return folder


@pytest.mark.live
@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "there is no"),
        ("class Other: pass", "AttributeError: module 'released_rwkv4' has no attribute 'RWKV'"),
        ("import lightning_of_tomorrow", "ModuleNotFoundError: No module named 'lightning_of_tomorrow'"),
    ],
)
def test_a_clone_that_is_another_one_is_an_error_in_one_line(tmp_path, program, said):
    clone = tmp_path / "clone" if program is None else _clone(tmp_path / "clone", program)
    command = [
        sys.executable,
        "-m",
        "experiments.trajectory.run",
        "--smoke",
        f"--out={tmp_path}",
        f"--rwkv-lm={clone}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and error.startswith("error: ") and said in error and "Traceback" not in done.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.live
@pytest.mark.usefixtures("x64")
def test_the_kernel_that_stands_in_for_the_released_one_is_wkv_and_its_gradient():
    import torch

    from experiments.trajectory import released

    rng, (B, T, C) = np.random.default_rng(0), (2, 7, 5)
    k, v, dy = (3 * rng.standard_normal((B, T, C)) for _ in range(3))
    decay, u = rng.standard_normal(C), rng.standard_normal(C)
    run_ours = lambda decay, u, k, v: wkv4(-jnp.exp(decay), u, k, v, impl="scan")[0]
    y, pull = jax.vjp(run_ours, decay, u, k, v)
    t = torch.from_numpy
    w, theirs = t(-np.exp(decay)), torch.empty(B, T, C, dtype=torch.float64)
    released.wkv_forward(B, T, C, w, t(u), t(k), t(v), theirs)
    np.testing.assert_allclose(theirs.numpy(), y, rtol=1e-12)
    dw, du = (torch.empty(B, C, dtype=torch.float64) for _ in range(2))
    dk, dv = (torch.empty(B, T, C, dtype=torch.float64) for _ in range(2))
    released.wkv_backward(B, T, C, w, t(u), t(k), t(v), theirs, t(dy), dw, du, dk, dv)
    for name, a, b in zip(
        ("decay", "u", "k", "v"), (dw.sum(0), du.sum(0), dk, dv), pull(jnp.asarray(dy)), strict=True
    ):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-10, atol=1e-12, err_msg=name)
