"""The training step against the released trainer in float64: 150 recorded steps, and a clone's own `model.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.trajectory import released, run
from rwkv_jax.ops import wkv4

FEW = 12  # steps: all tensors get gradients from the third on, and Adam's moments have been used


@pytest.mark.parametrize("steps", [FEW, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", run.RECIPES)
def test_trajectory_equals_that_of_the_released_trainer(version, steps):
    found = run.apart(run.ours(steps, version), run.kept(steps, version))
    assert len(found.pop("loss_by_step")) == steps
    assert len(found) == (3 if steps == 150 else 2)  # the final tensors are those of the last step
    assert max(found.values()) < run.WITHIN  # the file holds the tensors as float32


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"l2wrap": False}, {"groups": ()}])
def test_trajectory_differs_if_a_part_of_the_step_is_left_out(change):
    assert run.apart(run.ours(30, **change), run.kept(30))["loss_nats"] > 1e-5


def test_apart_returns_the_largest_difference_of_each_kind():
    a = np.array([1.0, 2.0]), np.array([4.0, 4.0]), {"x": np.array([1.0, 5.0])}
    b = np.array([1.5, 2.0]), np.array([4.0, 5.0]), {"x": np.array([1.0, 4.0])}
    found = run.apart(a, b)
    assert found.pop("loss_by_step") == [0.5, 0.0]
    assert found == pytest.approx({"loss_nats": 0.5, "grad_norm_relative": 0.2, "final_tensors": 1.0})
    assert "final_tensors" not in run.apart(a, (*b[:2], None))


def test_trajectory_conclude_contradicts_if_one_number_is_beyond_tolerance():
    cell = {"from kept": {"loss_nats": 1e-8, "grad_norm_relative": 1e-8, "loss_by_step": [1e-8]}}
    values = {name: cell for name in run.CELLS} | {"clone, model.py 123": {"from clone": cell["from kept"]}}
    verdict = lambda: run.conclude(run.PRESETS["smoke"], values)["ledger"][0]["verdict"]
    assert verdict() == "reproduced"
    values["clone, model.py 123"] = {"from clone": cell["from kept"] | {"grad_norm_relative": 1e-5}}
    assert verdict() == "contradicted"


def test_trajectory_command_reports_a_folder_that_is_no_clone_in_one_line(tmp_path, capsys):
    assert run.main(["--smoke", f"--out={tmp_path}", f"--rwkv-lm={tmp_path / 'clone'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --rwkv-lm=") and "there is no" in error and error.count("\n") == 1
    assert not (tmp_path / "results.json").exists()


@pytest.mark.live
def test_released_trajectory_reports_why_a_foreign_program_fails(tmp_path):
    path = tmp_path / released.FILE
    path.parent.mkdir(parents=True)
    path.write_text("import lightning_of_tomorrow")
    assert released.source(tmp_path) == path
    golden = run.golden()
    tensors, tokens_NBT = run.start(golden), golden["tokens"][:1]
    with pytest.raises(
        ValueError, match=r"does not run as it did at commit .*No module named 'lightning_of_tomorrow'"
    ):
        released.trajectory(path, tensors, tokens_NBT, run.RECIPES["rwkv4"][0])


@pytest.mark.live
@pytest.mark.usefixtures("x64")
def test_released_kernel_substitute_computes_wkv_and_its_gradient():
    import torch

    rng, (B, T, C) = np.random.default_rng(0), (2, 7, 5)
    k, v, dy = (3 * rng.standard_normal((B, T, C)) for _ in range(3))
    decay, u = rng.standard_normal(C), rng.standard_normal(C)

    @jax.jit
    def ours(dy, *inputs):
        compute = lambda decay, u, k, v: wkv4(-jnp.exp(decay), u, k, v, impl="scan")[0]
        y, pull = jax.vjp(compute, *inputs)
        return y, pull(dy)

    y, gradients = ours(dy, decay, u, k, v)
    t = torch.from_numpy
    w, theirs = t(-np.exp(decay)), torch.empty(B, T, C, dtype=torch.float64)
    released.wkv_forward(B, T, C, w, t(u), t(k), t(v), theirs)
    np.testing.assert_allclose(theirs.numpy(), y, rtol=1e-12)
    dw, du = (torch.empty(B, C, dtype=torch.float64) for _ in range(2))
    dk, dv = (torch.empty(B, T, C, dtype=torch.float64) for _ in range(2))
    released.wkv_backward(B, T, C, w, t(u), t(k), t(v), theirs, t(dy), dw, du, dk, dv)
    for name, a, b in zip(("decay", "u", "k", "v"), (dw.sum(0), du.sum(0), dk, dv), gradients, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-10, atol=1e-12, err_msg=name)
