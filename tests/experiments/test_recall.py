"""The experiment on recall: its sequences, and its verdicts."""

import numpy as np
import pytest

from experiments import study
from experiments.recall import run
from experiments.recall.sequences import recall

B, T, N, V = 64, 20, 4, 24


def test_recall_asks_each_key_once_and_has_no_other_pairs():
    batch, again, other = (recall(np.random.default_rng(seed), B, T, N, V) for seed in (0, 0, 1))
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        pairs = dict(row[: 2 * N].reshape(N, 2).tolist())
        assert len(pairs) == N and max(pairs) < V // 2 <= min(pairs.values()) and len(set(pairs.values())) == N
        at = np.flatnonzero(mask)
        assert at.min() >= 2 * N and sorted(row[at]) == sorted(pairs)
        assert [pairs[key] for key in row[at]] == row[at + 1].tolist()
        rest = np.delete(row, [*range(2 * N), *at, *at + 1])
        assert (rest < V // 2).all() and not set(rest) & set(pairs)
    assert (again["tokens"] == batch["tokens"]).all() and (other["tokens"] != batch["tokens"]).any()
    with pytest.raises(ValueError, match="6 pairs do not fit 20 tokens"):
        recall(np.random.default_rng(0), 1, 20, 6, 64)


def test_recall_asks_more_often_near_the_pairs():
    many = recall(np.random.default_rng(1), 2000, T, 1, V)["mask"].sum(axis=0)
    places = many[2::2]
    assert (many[:2] == 0).all() and (many[3::2] == 0).all()
    weights = np.arange(1.0, len(places) + 1) ** -0.99
    np.testing.assert_allclose(places / places.sum(), weights / weights.sum(), atol=0.04)


def test_reached_gives_the_first_evaluation_at_the_share():
    assert run.reached([[10, 0.5], [20, 0.91], [30, 0.8]]) == 20
    assert run.reached([[10, [0.5, 0.92]], [20, [0.1, 0.2]]]) == 10  # the best of several learning rates counts
    assert run.reached([[10, 0.5]]) == np.inf


@pytest.mark.parametrize(
    "slow, fast, verdict",
    [
        ([20, np.inf], [10, 10], "same sign"),
        ([10, 10], [20, np.inf], "contradicted"),
        ([np.inf, 20], [np.inf, 10], "not resolved"),
        ([np.inf, np.inf], [np.inf, np.inf], "not comparable"),
    ],
)
def test_recall_later_needs_every_case(slow, fast, verdict):
    assert run.later(slow, fast) == verdict


@pytest.mark.parametrize(
    "slow, fast, told",
    [
        ([40, 20], [10, 20], "2 times (1 to 4)"),
        ([40], [10], "4 times"),
        ([np.inf, 20], [10, 20], "at least 3.1 times"),  # 3.16, rounded down
        ([40, 20], [10, np.inf], "at most 0.9 times"),  # 0.894, rounded up
        ([np.inf, 20], [10, np.inf], "a number of times not known"),
        ([np.inf, 50], [np.inf, 10], "5 times"),  # a case that neither solves is left out
        ([np.inf], [np.inf], "a number of times not known"),
    ],
)
def test_recall_times_is_a_geometric_mean_over_cases_or_a_bound(slow, fast, told):
    assert run.times(slow, fast, [100] * len(slow)) == told


def test_swept_name_keeps_the_names_of_an_earlier_sweep_at_t_32():
    its = study.Study(**run.STUDY)
    names = {run.swept_name(arm) for arm in study.arms_of(its)}
    assert names == set(run.PAPER) | {f"{arm}, T 64" for arm in run.VERSIONS}
    rates = run.STUDY["sweep"]
    first = {}  # the first arm of each name, where its rate is swept
    for arm, (changes,) in study.arms_of(its).items():
        first.setdefault((rates.name(arm), changes["model.dim"]), (changes["seq_len"], changes["pairs"]))
    assert set(first.values()) == {(32, 2), (64, 8)} and len(first) == len(run.PAPER) + 2 * len(run.VERSIONS)


@pytest.mark.parametrize(("transformer", "first"), [(np.inf, "not comparable"), (4_000, "same sign")])
def test_recall_conclude_compares_versions_at_t_64_and_the_paper_elsewhere(transformer, first):
    its = study.Study(**run.STUDY)
    needed = {"rwkv4": np.inf, "rwkv5": 20_000, "rwkv6": 10_000, "rwkv7": 5_000, "transformer": transformer}

    def curve(arm, changes):
        model = arm.split(",")[0]
        if (model, changes["seq_len"]) == ("rwkv4", 64):
            return [[40_000, 0.95]]
        examples = needed.get(model, 4_000)
        return [[examples, 0.95]] if np.isfinite(examples) else [[128_000, 0.5]]

    values = {f"{arm}, seed 0": {"curve": curve(arm, changes)} for arm, (changes,) in study.arms_of(its).items()}
    found = run.conclude(its, values)
    ratios = [("at least 32", first), ("at least 32", "no claim")]
    ratios += [("2 times (2 to 2)", "same sign"), ("4 times (4 to 4)", "same sign"), ("2 times (2 to 2)", "no claim")]
    for row, (ratio, verdict) in zip(found["ledger"], ratios, strict=True):
        assert ratio in row["ours"] and row["verdict"] == verdict
    assert found["examples_to_0.9"]["T 32, n 3, D 64"]["rwkv4"] is None
    assert found["examples_to_0.9"]["T 64, n 8, D 32"] == {
        "rwkv4": 40_000, "rwkv5": 20_000, "rwkv6": 10_000, "rwkv7": 5_000, "transformer+shift": 4_000, "hybrid": 4_000
    }  # fmt: skip
