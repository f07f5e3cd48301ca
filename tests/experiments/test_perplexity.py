"""The experiment on perplexity: sweeps, intervals, and conclusions from levels."""

import numpy as np
import pytest

from experiments import statistics, study, sweeps
from experiments.perplexity import run


def test_config_of_a_run_has_the_fields_of_its_preset():
    of = lambda preset, arm: study.config_of(
        its := study.chosen(study.Study(**run.STUDY), preset), study.arms_of(its)[arm][0]
    )
    config = of("gpu", "transformer+shift")
    assert config.model.variant.token_shift and config.model.dropout == 0.1 and config.model.dim == 512
    assert config.optim.weight_decay == 0.1 and config.seq_len == 1024
    assert of("paper", "transformer").optim.lr_end == 1e-5 and of("cpu", "hybrid").model.layers == (
        "rwkv4",
        "attention",
    )
    assert of("cpu", "lstm").optim.lr == sweeps.best(run.SWEEP, "lstm 4x128")


# ------------------------------------------------------------------------------------------------ sweeps


def test_sweep_extends_until_its_best_rate_is_inside(tmp_path, capsys):
    tried = []

    def loss_of(lr):
        tried.append(lr)
        return abs(np.log2(lr / 16e-3))

    path = tmp_path / "sweep.json"
    sweeps.bracket(path, "rwkv4 4x96", 2.2e-3, loss_of, steps=5)
    assert tried == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
    assert sweeps.lr(path, "rwkv4", 4, 96) == 16e-3
    sweeps.bracket(path, "rwkv4 4x96", 2.2e-3, loss_of, steps=5)
    assert len(tried) == 6 and len(capsys.readouterr().out.splitlines()) == 6


def test_rates_between_swept_widths_are_interpolated_in_log_log(tmp_path):
    none = tmp_path / "sweep.json"
    assert sweeps.lr(none, "transformer+shift", 4, 128) == 4e-3 and sweeps.lr(none, "lstm", 4, 128) is None
    assert sweeps.lr(none, "rwkv4", 3, 32) == pytest.approx(sweeps.lr(none, "rwkv4", 2, 64))
    assert sweeps.lr(none, "rwkv4", 3, 90) == pytest.approx((16e-3 * 8e-3) ** 0.5, rel=0.02)
    assert 6e-4 < sweeps.lr(none, "rwkv4", 12, 512) < 4e-3


# ------------------------------------------------------------------------------------------- differences


def test_intervals_over_seeds_and_over_documents_are_those_by_hand():
    by_seed = np.array([110, 142]) / 110
    mean, low, high = statistics.t_interval(by_seed)
    half = 12.7062 * by_seed.std(ddof=1) / np.sqrt(2)
    assert (mean, low, high) == pytest.approx((by_seed.mean(), mean - half, mean + half), rel=1e-4)
    nats_SD = np.log(2) * np.array([[10.0, 100.0]])  # 1 and 0.5 bits a byte
    assert statistics.over_documents(nats_SD, [10, 200]) == pytest.approx((0.5, 1.0))
    assert statistics.wider((low, high), (0.5, 1.0)) == (low, high)
    assert np.isnan(statistics.over_documents(nats_SD[:, :1], [10])).all()
    assert np.isnan(statistics.t_interval(by_seed[:1])[1:]).all()


def points(**axes):
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def test_times_fewer_tokens_is_interpolated_and_bounded():
    of = lambda bits: points(tokens=(1e6, 2e6, 4e6), bits_per_byte=bits)
    factor = lambda bits: run.times_fewer(of(bits), of((3.0, 2.5, 2.0)))
    assert factor((3.0, 2.0, 1.5)) == {"factor": pytest.approx(2), "bound": None}
    assert factor((2.5, 1.5, 1.2)) == {"factor": pytest.approx(8**0.5), "bound": None}
    assert factor((1.9, 1.5, 1.2)) == {"factor": 4, "bound": "at least"}
    assert factor((3.5, 3.0, 2.1)) == {"factor": 1, "bound": "less than"}


def test_gap_at_equal_compute_is_interpolated_between_budgets():
    others = points(flops=(2.0, 8.0), bits_per_byte=(3.0, 1.0))
    gap = lambda flops, bits: run.gap_at_equal(points(flops=flops, bits_per_byte=bits), others, "flops")
    assert gap((1.0, 4.0), (2.5, 1.5)) == {"at": 4.0, "bits_per_byte": pytest.approx(1.5 - 2.0)}
    assert gap((9.0, 10.0), (1.0, 0.9))["bits_per_byte"] is None


@pytest.mark.parametrize(
    ("low", "high", "sign", "paper", "expected"),
    [
        (0.03, 0.05, 1, 0.041, "reproduced"),
        (0.05, 0.07, 1, 0.041, "same sign"),
        (-0.05, -0.03, 1, 0.041, "contradicted"),
        (-0.01, 0.05, 1, 0.041, "not resolved"),
        (None, None, 1, 0.041, "not resolved"),
        (0.03, 0.05, -1, None, "contradicted"),  # against a claim of the other sign without a number
        (-0.05, -0.03, -1, None, "same sign"),
    ],
)
def test_verdict_follows_the_header(low, high, sign, paper, expected):
    assert statistics.verdict(low, high, sign, paper) == expected


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
    assert found["share_of_gap_that_token_shift_closes"] == pytest.approx(0.5)
    assert found["tokens_of_transformer_over_own"]["rwkv4"]["bound"] == "at least"
    assert "behind the 6-gram 2.500" in found["ledger"][0]["ours"]
