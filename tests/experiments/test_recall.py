"""The experiment on recall: its sequences, and its verdicts."""

import numpy as np
import pytest

from experiments.recall import run
from experiments.recall.sequences import recall

B, T, N, V = 64, 20, 4, 24


def test_recall_asks_each_key_once_and_nothing_else_looks_like_a_pair():
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


def test_recall_asks_near_the_pairs_more_often():
    many = recall(np.random.default_rng(1), 2000, T, 1, V)["mask"].sum(axis=0)
    places = many[2::2]
    assert (many[:2] == 0).all() and (many[3::2] == 0).all()
    weights = np.arange(1.0, len(places) + 1) ** -0.99
    np.testing.assert_allclose(places / places.sum(), weights / weights.sum(), atol=0.04)


def test_reached_is_the_first_look_at_the_share():
    assert run.reached([[10, 0.5], [20, 0.91], [30, 0.8]]) == 20
    assert run.reached([[10, [0.5, 0.92]], [20, [0.1, 0.2]]]) == 10  # the best of several rates
    assert run.reached([[10, 0.5]]) == np.inf


@pytest.mark.parametrize(
    "slow, fast, verdict",
    [
        ([20, np.inf], [10, 10], "same sign"),
        ([10, 10], [20, np.inf], "contradicted"),
        ([np.inf, 20], [np.inf, 10], "not resolved"),
    ],
)
def test_later_needs_every_case(slow, fast, verdict):
    assert run.later(slow, fast) == verdict
