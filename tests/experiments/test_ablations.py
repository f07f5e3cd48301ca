"""The ablations: paired comparisons of made-up runs; each arm differs from the default by one thing."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.ablations import table
from experiments.ablations.run import ARMS, PRESETS, PRINTED, RELEASED, conclude, config_of, name_of, over_documents
from rwkv_jax import hardware, models
from rwkv_jax.run_config import model_of

PRESET = PRESETS["cpu"]
EFFECTS = {"no token shift": 0.1, "GELU": 0.03, "u = 0": 0.003, PRINTED: 0.2}


def values(effects, noise=1e-4):
    """Runs of all arms: level by seed, effect by arm, four documents of 1,000 bytes that differ by a lot."""
    rng = np.random.default_rng(0)
    found = {}
    for arm in PRESET.arms:
        for seed in PRESET.seeds:
            bits = 2.3 + 0.05 * seed + effects.get(arm, 0) + noise * rng.standard_normal()
            documents = np.array([0.5, 0.8, 1.2, 1.5]) * 1000 * bits * np.log(2)
            found[name_of(arm, seed, 1.0)] = {
                "bits_per_byte": bits, "valid_bits_per_byte": bits, "document_nats": documents.tolist(),
                "document_bytes": [1000] * 4, "parameters": 1, "flops_per_token": 1e6,
            }  # fmt: skip
    return found


def test_conclude_resolves_differences_above_the_noise_of_seeds():
    concluded = conclude(PRESET, values(EFFECTS))
    rows = concluded["arms"]
    assert {arm for arm, row in rows.items() if row.get("resolved")} >= {"no token shift", "GELU", PRINTED}
    assert not rows["exponent n"]["resolved"] and "difference" not in rows[RELEASED]
    for arm, effect in EFFECTS.items():
        assert rows[arm]["difference"] == pytest.approx(effect, abs=3e-4)
        assert rows[arm]["low"] < effect < rows[arm]["high"] and rows[arm]["p_holm"] >= rows[arm]["p"]
    assert [row["verdict"] for row in concluded["ledger"]] == ["same sign", "contradicted"]


@pytest.mark.parametrize(
    ("effects", "verdicts"),
    [
        ({}, ["not resolved", "not resolved"]),
        ({"no receptance": -0.1, "GELU": 0.1}, ["contradicted", "not resolved"]),
        ({"exponent n": -0.1, "GELU": 0.1}, ["same sign", "not resolved"]),  # nothing is taken away by it
    ],
    ids=str,
)
def test_conclude_gives_the_verdict_of_each_effect(effects, verdicts):
    assert [row["verdict"] for row in conclude(PRESET, values(effects))["ledger"]] == verdicts


def test_conclude_reports_the_wider_interval():
    """Documents that differ in the effect make an interval that seeds which agree do not."""
    found = values({"GELU": 0.03}, noise=0)
    for seed in PRESET.seeds:
        found[name_of("GELU", seed, 1.0)]["document_nats"][3] += 500
    runs = lambda arm: [found[name_of(arm, seed, 1.0)] for seed in PRESET.seeds]
    low, high = over_documents(runs("GELU"), runs(RELEASED))
    row = conclude(PRESET, found)["arms"]["GELU"]
    assert (row["low"], row["high"]) == (low, high) and high - low > 0.1


def test_conclude_takes_each_arm_at_its_best_rate_on_validation_text():
    preset = replace(PRESET, arms=(RELEASED, "GELU", PRINTED), rates=(0.5, 1.0))
    found = values({"GELU": 0.1})
    for arm in preset.arms:
        for seed in preset.seeds:
            better = dict(found[name_of(arm, seed, 1.0)])
            better["valid_bits_per_byte"] += -0.1 if arm == "GELU" else 0.1
            better["bits_per_byte"] -= 0.06
            found[name_of(arm, seed, 0.5)] = better
    rows = conclude(preset, found)["arms"]
    assert [rows[arm]["lr"] for arm in preset.arms] == [PRESET.lr, PRESET.lr / 2, PRESET.lr]
    assert rows["GELU"]["difference"] == pytest.approx(0.04, abs=1e-3)


def test_config_of_an_arm_changes_one_thing():
    default = config_of(PRESET, RELEASED, 0, PRESET.lr)
    assert default.optim.groups is None
    for arm in ARMS:
        config = config_of(PRESET, arm, 0, PRESET.lr)
        changed = [key for key in default.model if config.model[key] != default.model[key]]
        of_the_model = {"no receptance, F + D": 2, "all matrices N(0, 0.02)": 2} | dict.fromkeys(
            (RELEASED, "fixed decay", "one learning rate"), 0
        )
        assert len(changed) == of_the_model.get(arm, 1), arm
        config.model, config.optim.groups = default.model, default.optim.groups
        assert config == default


def test_wider_channel_mixing_has_the_parameters_of_the_receptances():
    """But for the receptances' four mixes less two: 2 D a layer fewer, of 13 D^2."""

    def of(arm):
        model = model_of(config_of(PRESET, arm, 0, 1.0))
        count = sum(x.size for x in jax.tree.leaves(models.parameter_shapes(model)))
        return count, hardware.flops_per_token(model, PRESET.seq_len)

    (count, flops), (wider, its), (fewer, _) = map(of, (RELEASED, "no receptance, F + D", "no receptance"))
    L, D = PRESET.num_layers, PRESET.dim
    assert count - wider == 2 * D * L and its == flops
    assert count - fewer == L * (2 * D * D + 2 * D)


def test_table_has_every_arm_and_marks_what_is_resolved():
    stamp = {"processor": "p", "cores": 2, "versions": {"jax": "j"}, "date": "d"}
    results = {"fields": vars(PRESET), "stamp": stamp, "wall_seconds": 1.0, **conclude(PRESET, values(EFFECTS))}
    lines = table.render(results).splitlines()
    assert all(any(line.startswith(arm + " ") for line in lines) for arm in ARMS)
    assert "*" in next(line for line in lines if line.startswith("no token shift"))
    assert "*" not in next(line for line in lines if line.startswith("exponent n"))
