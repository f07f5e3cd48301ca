"""Recall: what its sequences hold, how training on generated sequences goes, and what the verdicts rest on."""

import jax
import numpy as np
import pytest

import rwkv_jax
from experiments import tasks
from experiments.recall import run
from experiments.recall.sequences import recall

B, T, N, V = 64, 20, 4, 24


@pytest.fixture(scope="module")
def batch():
    return recall(np.random.default_rng(0), B, T, N, V)


def test_each_key_is_asked_once_and_its_value_follows(batch):
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        pairs = dict(row[: 2 * N].reshape(N, 2).tolist())
        assert len(pairs) == N and max(pairs) < V // 2 <= min(pairs.values()) and len(set(pairs.values())) == N
        at = np.flatnonzero(mask)
        assert at.min() >= 2 * N and sorted(row[at]) == sorted(pairs)
        assert [pairs[key] for key in row[at]] == row[at + 1].tolist()


def test_nothing_else_looks_like_a_pair(batch):
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        rest = np.ones(T + 1, bool)
        rest[: 2 * N] = False
        rest[:-1] &= ~mask
        rest[1:] &= ~mask
        assert (row[rest] < V // 2).all()  # no value but the pairs' and the answers
        assert not set(row[rest]) & set(row[: 2 * N : 2])


def test_questions_come_near_the_pairs_more_often():
    many = recall(np.random.default_rng(1), 2000, T, 1, V)["mask"].sum(axis=0)
    places = many[2::2]
    assert (many[:2] == 0).all() and (many[3::2] == 0).all()
    weights = np.arange(1.0, len(places) + 1) ** -0.99
    np.testing.assert_allclose(places / places.sum(), weights / weights.sum(), atol=0.04)


def test_a_seed_is_its_batch(batch):
    again, other = (recall(np.random.default_rng(seed), B, T, N, V) for seed in (0, 1))
    assert (again["tokens"] == batch["tokens"]).all() and (other["tokens"] != batch["tokens"]).any()


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 pairs do not fit 20 tokens"):
        recall(np.random.default_rng(0), 1, 20, 6, 64)


def test_several_rates_train_as_each_alone():
    model = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=1, dim=8)
    draw = lambda step: recall(np.random.default_rng(step), 4, T, N, V)
    look = lambda step, params: (step, step == 4)
    train = lambda lr: tasks.fit(model, draw, lr=lr, steps=6, every=2, look=look)
    (together, seen), *alone = (train(lr) for lr in ((1e-2, 3e-2), 1e-2, 3e-2))
    assert seen == [2, 4]
    for i, (params, _) in enumerate(alone):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)
    moved = [np.abs(params["head"]["kernel"]).sum() for params, _ in alone]
    assert moved[0] != moved[1]


def test_the_share_right_counts_questions_alone(batch):
    model = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=1, dim=8)
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"]
    guess, _ = jax.jit(model.apply)({"params": params}, batch["tokens"][:, :-1])
    right = np.asarray(guess.argmax(-1)) == batch["tokens"][:, 1:]
    assert tasks.share_right(model, params, batch) == pytest.approx(right[batch["mask"]].mean())
    assert right[batch["mask"]].mean() != pytest.approx(right.mean())


def test_examples_to_a_share():
    assert run.reached([[10, 0.5], [20, 0.91], [30, 0.8]]) == 20
    assert run.reached([[10, [0.5, 0.92]], [20, [0.1, 0.2]]]) == 10  # the best of several rates
    assert run.reached([[10, 0.5]]) == np.inf


@pytest.mark.parametrize(
    "slow, fast, verdict",
    [
        ([20, np.inf], [10, 10], "same sign"),
        ([10, 10], [20, np.inf], "contradicted"),
        ([20, 10], [10, 20], "not resolved"),
        ([np.inf, 20], [np.inf, 10], "not resolved"),
    ],
)
def test_later_is_later_in_every_case(slow, fast, verdict):
    assert run.later(slow, fast) == verdict
