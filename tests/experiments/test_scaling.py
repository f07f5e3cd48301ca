"""The experiment on scaling: fits and intervals on points of known laws, verdicts, cells."""

import numpy as np
import pytest

from experiments import statistics, study
from experiments.scaling import fit, run

COMPUTE = np.geomspace(1e13, 1e16, 36)
NOISE = 1 + 0.002 * np.random.default_rng(0).standard_normal(len(COMPUTE))


def test_scaling_presets_have_a_rate_at_every_size():
    for name in ("cpu", *run.STUDY["presets"]):
        its = study.chosen(study.Study(**run.STUDY), name)
        assert all(1e-5 < changes["optim.lr"] < 0.1 for (changes,) in study.arms_of(its).values())


def test_pareto_keeps_runs_that_no_cheaper_run_beats():
    compute, loss = [1, 2, 2, 3, 4, 5], [5.0, 4.0, 4.5, 4.2, 4.0, 3.0]
    assert fit.pareto(compute, loss).tolist() == [0, 1, 5]
    assert fit.pareto(compute[::-1], loss[::-1]).tolist() == [5, 4, 0]


def test_judged_recovers_the_laws_and_a_line_misses_a_saturating_one():
    straight = fit.judged(COMPUTE, 30 * COMPUTE**-0.055, 1e15)
    assert sum(straight["points"]) == 36
    for name in fit.LAWS:
        assert straight[name]["exponent"] == pytest.approx(0.055, rel=0.02)
        assert straight[name]["beyond"]["max"] < 1e-3
    assert straight["line"]["k"] * straight["line"]["unit"] ** 0.055 == pytest.approx(30, rel=1e-6)
    law = fit.Law(0.6, 1.2, 0.12, 1e14)
    bent = fit.judged(COMPUTE, law(COMPUTE), 1e15)
    ours = fit.Law(*(bent["saturating"][name] for name in fit.Law._fields))
    assert ours.floor == pytest.approx(0.6, rel=1e-4)
    np.testing.assert_allclose(ours(COMPUTE), law(COMPUTE), rtol=1e-6)
    assert bent["line"]["fit"]["r2_explained"] > 0.99 and bent["line"]["beyond"]["max"] > 0.02
    assert fit.judged(COMPUTE[:5], COMPUTE[:5] ** -0.1, COMPUTE[2]) is None
    for fitted in (2, 3):  # of 5 runs: too few for the laws, or for a draw without one of them
        assert fit.bootstrap(COMPUTE[:5], COMPUTE[:5] ** -0.1, COMPUTE[fitted], samples=5) == {"samples": 0}
    assert fit.bootstrap(COMPUTE[:6], COMPUTE[:6] ** -0.1, COMPUTE[4], samples=20)["samples"] > 0


def test_bootstrap_separates_a_line_from_a_saturating_law():
    """Applies the rule of the header: a floor above 0, and a line that predicts worse. Of 24 lines with this noise,
    the floor's interval excluded 0 for 2, this one among them, and the line predicted worse for none."""
    straight = fit.bootstrap(COMPUTE, 30 * COMPUTE**-0.055 * NOISE, 1e15, samples=60)
    low, high = straight["line exponent"]
    assert low < 0.055 < high and high - low < 0.002
    assert straight["line minus saturating, rms beyond"][0] < 0
    bent = fit.bootstrap(COMPUTE, fit.Law(1.0, 1.0, 0.25, 1e14)(COMPUTE) * NOISE, 1e15, samples=60)
    assert bent["floor"][0] > 0.5 and bent["line minus saturating, rms beyond"][0] > 0.01


def test_chinchilla_law_without_noise_fits_a_line_by_r2():
    """Along its frontier the law is 1.69 + k C^-0.1535. A line has r^2 0.998 over two decades and is off by 5 % on the
    third."""
    found = fit.judged(run.SYNTHETIC, fit.chinchilla(run.SYNTHETIC), 1.0001e19)
    line, curve = found["line"], found["saturating"]
    assert curve["floor"] == pytest.approx(1.69, rel=1e-4) and curve["exponent"] == pytest.approx(0.1535, abs=1e-4)
    assert line["fit"]["r2_explained"] == pytest.approx(0.998, abs=5e-4) and 0.05 < line["beyond"]["max"] < 0.06
    # the two definitions of r^2 differ where a law is off with the same sign everywhere
    assert line["beyond"]["r2_correlation"] > 0.99 and line["beyond"]["r2_explained"] < 0.3
    # no other split of 6 N D = C between parameters and data is better
    of = lambda n, d: 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28
    splits = np.geomspace(1e6, 1e12, 2001)
    assert fit.chinchilla(1e19) == pytest.approx(of(splits, 1e19 / 6 / splits).min(), rel=1e-5)


def test_fit_ratio_is_that_of_the_compute_for_the_lowest_loss_of_both():
    """Six documents of 100, 200 and 300 bytes. One model needs three times the compute for each loss, and ends at a
    higher one; in two documents it is worse by more."""
    loss, bytes_D = fit.Law(0.6, 1.2, 0.12, 1e14)(COMPUTE), np.array([100, 200, 300] * 2)
    nats_ND, few = loss[:, None] * bytes_D, slice(0, 30)
    found = fit.ratio((3 * COMPUTE[few], nats_ND[few]), (COMPUTE, nats_ND), bytes_D)
    assert found["ratio"] == pytest.approx(3) and found["loss_nats"] == pytest.approx(loss[29])
    assert (found["low"], found["high"]) == (pytest.approx(3), pytest.approx(3))
    worse_ND = nats_ND[few] + [0, 0, 3] * 2
    found = fit.ratio((3 * COMPUTE[few], worse_ND), (COMPUTE, nats_ND), bytes_D)
    assert found["low"] == pytest.approx(3) and found["ratio"] > 3.1 and found["high"] > found["ratio"]
    reverse = fit.ratio((COMPUTE, nats_ND), (3 * COMPUTE[few], worse_ND), bytes_D)
    assert reverse["ratio"] == pytest.approx(1 / found["ratio"])
    one = fit.ratio((3 * COMPUTE[few], loss[few, None]), (COMPUTE, loss[:, None]), [1])
    assert one["ratio"] == pytest.approx(3) and fit.told(one) == "3.00"
    assert fit.told(found).startswith(f"{found['ratio']:.2f} [3.00, ")
    assert fit.ratio((COMPUTE, nats_ND + 9e3), (COMPUTE, nats_ND), bytes_D) is None  # without a common loss


def test_fit_ratio_has_the_interval_over_seeds_where_that_is_wider():
    """Loss is C^-0.1: a loss that is 1 % higher takes 1.01^10 times the compute."""
    loss_ND = COMPUTE[:, None] ** -0.1
    spread = statistics.Spread(0.01 * loss_ND[30, 0] / 1.959964, 10**9)  # 95 % within 1 % of the lowest common loss
    found = fit.ratio((3 * COMPUTE[:31], loss_ND[:31]), (COMPUTE, loss_ND), [1], spread)
    of = pytest.approx
    assert (found["ratio"], found["low"], found["high"]) == (of(3), of(3 * 0.99**10), of(3 * 1.01**10))
    bytes_D = np.array([100, 200, 300] * 2)
    worse_ND = loss_ND[:31] * bytes_D * np.array([1, 1, 1.1] * 2)  # by more in two documents than seeds differ
    pair = (COMPUTE[:31], worse_ND), (COMPUTE, loss_ND * bytes_D)
    assert fit.ratio(*pair, bytes_D, spread) == fit.ratio(*pair, bytes_D)
    same = lambda *levels: np.outer(levels, np.ones(6))  # six documents
    few = ([1, 2], same(1.0, 0.995)), ([1, 2], same(0.999, 0.9))  # with 1 % more, no loss is common
    found = fit.ratio(*few, np.ones(6))
    assert found["low"] == of(found["ratio"])
    found = fit.ratio(*few, np.ones(6), statistics.Spread(0.01 / 1.959964, 10**9))
    assert found["ratio"] > 1 and found["low"] is found["high"] is None


def test_seed_spread_is_in_nats(monkeypatch):
    monkeypatch.setattr(run, "read", lambda name: {"spread": {"deviation": 0.004, "freedom": 6}})
    assert run.seed_spread() == (pytest.approx(0.004 * np.log(2)), 6)
    monkeypatch.setattr(run, "read", lambda name: {"spread": None})
    assert run.seed_spread() is None


def test_scaling_conclude_accepts_models_without_a_common_loss():
    its = study.Study(base={}, arms={"rwkv4 1x8": {}, "rwkv7 1x8": {}}, budgets=(1, 2), against=None)
    values = {
        study.name_of(arm, 0, budget): {"flops_per_token": 7, "tokens": budget, "bits_per_byte": level - 0.1 * budget}
        for arm, level in (("rwkv4 1x8", 2.0), ("rwkv7 1x8", 5.0))
        for budget in its.budgets
    }
    found = run.conclude(its, values)
    assert found["compute_at_equal_loss"] == {} and len(found["ledger"]) == 2


def test_scaling_runs_at_4x128_have_the_identity_of_the_perplexity_runs(tmp_path):
    """Runs with the same identity are computed once for both experiments."""
    small = {"base": run.STUDY["base"] | {"corpus": "stdlib"}, "also": dict}
    ours, theirs = (study.cells(study.Study(**its | small), tmp_path) for its in (run.STUDY, run.PERPLEXITY))
    shared = {name.replace(" 4x128", ""): cell for name, cell in ours.items() if " 4x128" in name}
    assert len(shared) == 24
    for name, cell in shared.items():
        assert cell.identity == theirs[name].identity


@pytest.mark.parametrize(
    ("points", "floor", "worse", "off", "expected"),
    [
        ([5, 3], [0.0, 0.5], [-0.1, 0.1], 0.04, "reproduced"),
        ([5, 3], [0.0, 0.5], [-0.1, 0.1], 0.06, "not resolved"),
        ([5, 3], [0.2, 0.5], [0.01, 0.1], 0.04, "contradicted"),
        ([5, 3], [0.2, 0.5], [-0.01, 0.1], 0.04, "not resolved"),
        ([4, 3], [0.0, 0.5], [-0.1, 0.1], 0.04, "not comparable"),
        ([5, 2], [0.0, 0.5], [-0.1, 0.1], 0.04, "not comparable"),
    ],
)
def test_scaling_verdict_follows_the_rule_of_the_header(points, floor, worse, off, expected):
    laws = {"points": points, "line": {"beyond": {"max": off}}}
    its = {"laws": laws, "intervals": {"samples": 9, "floor": floor, "line minus saturating, rms beyond": worse}}
    assert run.verdict(its) == expected
