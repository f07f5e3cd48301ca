"""The experiment on decays: half-lives, contrast between layers, the flat initialisation, verdicts."""

import jax
import numpy as np
import pytest
from small import drawn, make

from experiments import study
from experiments.decays import run
from rwkv_jax import models


def test_half_lives_and_contrast_agree_with_values_by_hand():
    decay_LD = np.array([[0.5, 0.5], [0.25, 2**-0.25]])
    x_LD = np.log(-np.log(decay_LD))
    np.testing.assert_allclose(run.half_lives(x_LD), [[1, 1], [0.5, 4]])
    cell = run.told(x_LD, x_LD[::-1])
    # doublings 0, 0 of the first layer and -1, 2 of the last: differences -1, 2; then reversed
    half = 12.7062 * 1.5  # t at 0.975 with one degree of freedom, times the error of the mean
    np.testing.assert_allclose(cell["contrast_before"], [0.5, 0.5 - half, 0.5 + half], atol=1e-3)
    np.testing.assert_allclose(cell["contrast_learned"], [-1, -1 - 2 * half, -1 + 2 * half], atol=1e-3)
    assert [layer["above_0.9"] for layer in run.layers(np.log(-np.log([[0.5, 0.95, 0.995, 0.8]])))] == [0.5]


def test_flattened_changes_decays_alone():
    _, params = drawn(make("rwkv4"))
    flat = run.flattened(params)
    x_LD = run.decays_of(flat)
    assert np.ptp(x_LD) == 0 and x_LD[0, 0] == pytest.approx(float(run.decays_of(params).mean()), rel=1e-6)
    same = jax.tree.map(np.array_equal, params, flat)
    changed = [jax.tree_util.keystr(path) for path, equal in jax.tree.leaves_with_path(same) if not equal]
    assert changed == ["['blocks']['att']['time_decay']"]


def test_initial_decays_are_those_drawn_in_the_paper():
    """Shares of decays above 0.9 in the layers of the 169M model: 22 % to 59 % by the released formula."""
    model = models.build("rwkv4", vocab_size=2, num_layers=12, dim=768, hidden_dim=1)
    x_LD = jax.jit(lambda: run.decays_of(run.initial(model)))()
    shares = [layer["above_0.9"] for layer in run.layers(np.asarray(x_LD))]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0.22, abs=0.01)
    assert shares[-1] == pytest.approx(0.59, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.3, "reproduced"), (-0.1, 0.3, "not resolved"), (-0.3, -0.1, "contradicted")]
)
def test_conclude_takes_the_verdict_from_the_flat_initialisation(low, high, verdict):
    layers, more = [{"above_0.9": 0.1}, {"above_0.9": 0.2}], [{"above_0.9": 0.1}, {"above_0.9": 0.3}]
    cell = {"before": layers, "after": more, "contrast_before": [1, 1, 1], "bits_per_byte": 2.0}
    values = {"released, seed 0": cell, "flat, seed 0": cell | {"contrast_learned": [(low + high) / 2, low, high]}}
    pattern, learned = run.conclude(study.Study(**run.STUDY), values)["ledger"]
    assert (pattern["verdict"], learned["verdict"]) == ("same sign", verdict)
    values["released, seed 0"] = cell | {"before": more}
    pattern, _ = run.conclude(study.Study(**run.STUDY), values)["ledger"]
    assert pattern["verdict"] == "not comparable"  # already so at initialisation
