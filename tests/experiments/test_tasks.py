"""Training on generated sequences: `tasks.fit` with several rates or given parameters; `tasks.share_right`."""

import functools

import jax
import numpy as np
import pytest
import small
import training

import rwkv_jax
from experiments import tasks
from experiments.recall.sequences import recall
from rwkv_jax import train

B, T, N, V = 4, 20, 4, 24
RATES = (1e-2, 3e-2)
MODEL = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=1, dim=8, scan=False)
STEPS = ["toy", pytest.param("rwkv4", marks=pytest.mark.slow)]


@pytest.fixture
def step(request, monkeypatch):
    """The toy step of tests/training.py or the real one, and the factor of its parameters at learning rate 0."""
    if request.param == "toy":
        monkeypatch.setattr(train, "make_init", training.toy_init)
        monkeypatch.setattr(train, "make_step", training.toy_step)
        monkeypatch.setattr(tasks, "_programs", toys)
    return 0.9 if request.param == "toy" else 1


toys = functools.cache(tasks._programs.__wrapped__)


def _batch(step):
    return recall(np.random.default_rng(step), B, T, N, V)


@pytest.mark.parametrize("step", STEPS, indirect=True)
def test_fit_of_several_rates_equals_one_fit_each_and_stops_when_told(step):
    look = lambda step, params: (step, step == 4)
    fit = lambda lr: tasks.fit(MODEL, _batch, lr=lr, steps=6, every=2, look=look)
    (together, seen), *alone = (fit(lr) for lr in (RATES, *RATES))
    assert seen == [2, 4]
    for i, (params, _) in enumerate(alone):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)
    assert not all(map(np.array_equal, *(jax.tree.leaves(params) for params, _ in alone)))


@pytest.mark.parametrize("step", STEPS, indirect=True)
def test_fit_starts_from_given_parameters_without_changing_them(step):
    first, _ = tasks.fit(MODEL, _batch, lr=RATES[0], steps=1)
    before = jax.tree.map(np.array, first)
    second, _ = tasks.fit(MODEL, _batch, lr=1e-9, steps=1, params=first)
    jax.tree.map(np.testing.assert_array_equal, first, before)  # not donated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, step * b, atol=1e-7), second, before)


def test_share_right_counts_only_tokens_of_the_mask():
    model, params = small.drawn(MODEL)
    batch = recall(np.random.default_rng(0), 64, T, N, V)
    logits_BTV, _ = small.forward(model, params, batch["tokens"][:, :-1])
    right_BT = np.asarray(logits_BTV).argmax(-1) == batch["tokens"][:, 1:]
    assert tasks.share_right(model, params, batch) == pytest.approx(right_BT[batch["mask"]].mean())
    assert right_BT[batch["mask"]].mean() != pytest.approx(right_BT.mean())
