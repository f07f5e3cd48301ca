"""The RWKV-4 ablations: verdicts from synthetic runs, and the one change of each arm."""

import jax
import numpy as np
import pytest

from experiments import study
from experiments.ablations.run import PRINTED, RELEASED, STUDY, conclude
from rwkv_jax import hardware, models
from rwkv_jax.train.run_config import model_of

ITS = study.Study(**STUDY)
CONFIGS = {arm: study.config_of(ITS, changes) for arm, (changes,) in study.arms_of(ITS).items()}


@pytest.mark.parametrize(
    ("effects", "verdicts"),
    [
        ({"no token shift": 0.1, "GELU": 0.03, "u = 0": 0.003, PRINTED: 0.2}, ["same sign", "contradicted"]),
        ({}, ["not resolved", "not resolved"]),
        ({"no receptance": -0.1, "GELU": 0.1}, ["contradicted", "not resolved"]),
        ({"exponent n": -0.1, "GELU": 0.1}, ["same sign", "not resolved"]),  # not an ablation
    ],
    ids=str,
)
def test_conclude_gives_a_verdict_on_each_ablation(effects, verdicts):
    """Synthetic runs of all arms: a level for each seed, an effect for each arm, noise of 1e-4."""
    rng = np.random.default_rng(0)
    level = lambda arm, seed: 2.3 + 0.05 * seed + effects.get(arm, 0) + 1e-4 * rng.standard_normal()
    values = {study.name_of(arm, seed): {"bits_per_byte": level(arm, seed)} for arm in CONFIGS for seed in range(3)}
    assert [row["verdict"] for row in conclude(ITS, values)["ledger"]] == verdicts


def test_ablation_arms_change_one_thing():
    default, flat = CONFIGS[RELEASED], lambda config: study.flat(config.to_dict())
    expected = dict.fromkeys(CONFIGS, 1) | {RELEASED: 0, "no receptance, F + D": 2, "all matrices N(0, 0.02)": 2}
    for arm, config in CONFIGS.items():
        assert len([key for key, x in flat(config).items() if x != flat(default)[key]]) == expected[arm], arm


def test_wider_arm_has_the_parameters_that_the_receptances_had():
    """Equal but for the mixes of the two receptances: 2 D parameters a layer fewer, out of 13 D^2."""

    def of(arm):
        model = model_of(CONFIGS[arm])
        count = sum(x.size for x in jax.tree.leaves(models.parameter_shapes(model)))
        return count, hardware.flops_per_token(model, CONFIGS[arm].seq_len)

    (count, flops), (wider, its), (fewer, _) = map(of, (RELEASED, "no receptance, F + D", "no receptance"))
    L, D = CONFIGS[RELEASED].model.num_layers, CONFIGS[RELEASED].model.dim
    assert count - wider == 2 * D * L and its == flops
    assert count - fewer == L * (2 * D * D + 2 * D)
