"""The RWKV-7 ablations: verdicts from synthetic runs, the one change of each arm, and fla's initial values."""

import jax
import numpy as np
import pytest

from experiments import study
from experiments.ablations_rwkv7.run import DELTA, RELEASED, SAID, START, STUDY, conclude, start_of_fla
from rwkv_jax import models

ITS = study.Study(**STUDY)
ARMS = study.arms_of(ITS)


@pytest.mark.parametrize(
    ("effects", "verdicts"),
    [
        ({"no value residual": 0.1, DELTA: -0.03, START: 0.2}, ["same sign", "same sign"]),
        ({}, ["not resolved", "not resolved"]),
        ({"decay without text": -0.1, DELTA: 0.1, START: -0.1}, ["contradicted", "contradicted"]),
        (
            {"removal 2": -0.1, DELTA: 0.1, "no bonus": 0.1},
            ["not resolved", "not resolved"],
        ),  # not argued for by the loss
    ],
    ids=str,
)
def test_conclude_gives_a_verdict_on_each_ablation(effects, verdicts):
    """Synthetic runs of all arms: a level for each seed, an effect for each arm, noise of 1e-4."""
    rng = np.random.default_rng(0)
    level = lambda arm, seed: 2.3 + 0.05 * seed + effects.get(arm, 0) + 1e-4 * rng.standard_normal()
    values = {study.name_of(arm, seed): {"bits_per_byte": level(arm, seed)} for arm in ARMS for seed in range(3)}
    found = conclude(ITS, values)
    parts, *never, start = (row["verdict"] for row in found["ledger"])
    assert [parts, start] == verdicts and never == ["not comparable", "no claim", "no claim"]
    assert found["beside"].keys() == SAID.keys() == ARMS.keys() - {RELEASED}


def test_ablation_arms_change_one_thing():
    flat = lambda arm: study.flat(study.config_of(ITS, *ARMS[arm]).to_dict())
    for arm in ARMS:
        assert len([key for key, x in flat(arm).items() if x != flat(RELEASED)[key]]) == (arm != RELEASED), arm


def test_start_of_fla_has_its_values_of_march_2025():
    """Compares standard deviations over 64 x 64 and more draws. With gain g, torch's Xavier initialiser is uniform
    within g sqrt(6 / (in + out))."""
    model = models.build("rwkv7", vocab_size=256, num_layers=2, dim=64, scan=False)
    params = jax.tree.map(np.asarray, start_of_fla(model, 0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, models.parameter_shapes(model))
    for block in (params["blocks_0"], params["blocks_1"]):
        att, ffn = block["att"], block["ffn"]
        bound = 2**-2.5 * (6 / 128) ** 0.5
        for name in ("receptance", "key", "value", "output"):
            assert 0.99 * bound < np.abs(att[name]["kernel"]).max() <= bound
        bound = 2**-2.5 * (6 / (64 + 32)) ** 0.5
        for name in ("w1", "w2", "a1", "a2", "g1", "g2"):
            assert 0.98 * bound < np.abs(att[name]).max() <= bound
        for name in ("x_r", "x_k", "w0", "a0", "k_k", "k_a", "r_k"):
            assert not att[name].any()
        assert not ffn["x_k"].any() and (att["ln_x"]["scale"] == 1).all() and not block["ln1"]["bias"].any()
        for kernel in (ffn["key"]["kernel"], ffn["value"]["kernel"]):
            assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert params["emb"]["embedding"].std() == pytest.approx(params["head"]["kernel"].std(), rel=0.05)
    again = jax.tree.map(np.asarray, start_of_fla(model, 1))
    assert (again["head"]["kernel"] != params["head"]["kernel"]).any()
