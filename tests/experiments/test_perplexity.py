"""The experiment on perplexity: configs of its presets, and conclusions from levels."""

import numpy as np
import pytest

from experiments import study, sweeps
from experiments.perplexity import run


def test_config_of_a_run_has_the_fields_of_its_preset():
    of = lambda preset, arm: study.config_of(
        its := study.chosen(study.Study(**run.STUDY), preset), study.arms_of(its)[arm][0]
    )
    config = of("gpu", "transformer+shift")
    assert config.model.variant.token_shift and config.model.dropout == 0.1 and config.model.dim == 512
    assert config.optim.weight_decay == 0.1 and config.seq_len == 1024
    assert of("paper", "transformer").optim.lr_end == 1e-5
    assert of("cpu", "hybrid").model.layers == ("rwkv4", "attention")
    assert of("cpu", "lstm").optim.lr == sweeps.best(run.SWEEP, "lstm 4x128")


def test_conclude_computes_every_conclusion_from_cells():
    """Levels of 3, 2 and 1 bits a byte after the longest budget, where the 6-gram has 2.5."""
    its = study.Study(base={}, arms={arm: {} for arm in run.MAIN}, seeds={"rwkv4": 2}, budgets=(10, 20),
                      against="transformer", measure=("bits_per_byte", "best_practice"))  # fmt: skip
    levels = {"rwkv4": (3.0, 1.0), "transformer": (4.0, 3.0), "transformer+shift": (3.0, 2.0)}
    values = {
        "speed": {"tokens_per_second": {"rwkv4": 20, "transformer": 10, "transformer+shift": 10}},
        "counted": {"budgets": {str(b): {"unigram": 5.0, "6-gram": 2.5, "xz": 2.0} for b in (10, 20)}},
    }
    for arm in run.MAIN:
        for seed in study.seeds_of(its, arm):
            for budget, bits in zip(its.budgets, levels[arm], strict=True):
                nats = {f"{name}_nats": [100 * bits * np.log(2), 300 * bits * np.log(2)] for name in its.measure}
                values[study.name_of(arm, seed, budget)] = nats | {
                    "tokens": 1000 * budget, "flops_per_token": 7, "bits_per_byte": bits, "best_practice": bits,
                    "bits_per_byte_bytes": [100, 300], "best_practice_bytes": [100, 300],
                }  # fmt: skip
    found = run.conclude(its, values)
    assert found["did_not_beat_counting"] == ["transformer"]
    assert [row["verdict"] for row in found["ledger"]] == ["not comparable", "contradicted"]
    assert found["points"]["rwkv4"][-1] == {"tokens": 20_000, "flops": 140_000, "seconds": 1000, "bits_per_byte": 1.0}
    row = study.compared(its, values)["rwkv4"]
    assert (row["difference"], row["low"], row["high"], row["seeds"]) == (-2, pytest.approx(-2), pytest.approx(-2), 1)
    assert "behind the 6-gram 2.500" in found["ledger"][0]["ours"]
