"""Schedules, learning rates by group, weight decay and the penalty on large logits."""

import jax
import numpy as np
import pytest
from small import drawn, make

from rwkv_jax.train import optim


def test_exponential_schedule_is_constant_between_warmup_and_decay():
    lr = optim.schedule("exponential", 1e-3, 1e-5, steps=100, warmup=10, decay_start=80)
    assert lr(0) == pytest.approx(1e-4) and lr(9) == lr(50) == lr(79 - 1) == 1e-3
    assert lr(99) == pytest.approx(1e-5) and lr(89) == pytest.approx(1e-4, rel=1e-6)


def test_constant_schedule_is_constant_after_warmup():
    lr = optim.schedule("constant", 1e-3, 1e-5, steps=10, warmup=4)
    assert [lr(i) for i in range(10)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, *[1e-3] * 7])


def test_cosine_schedule_rises_to_its_rate_and_falls_to_its_end():
    cosine = optim.schedule("cosine", 1e-3, 1e-5, steps=100, warmup=10)
    assert cosine(99) == pytest.approx(1e-5) and cosine(54) == pytest.approx(5.05e-4, rel=1e-2)
    rates = [cosine(i) for i in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_optimiser_applies_rates_and_decay_to_the_parameters_they_name():
    """Multipliers 2 and 3 for the decays and bonuses; decoupled decay for matrices, nothing else."""
    _, params = drawn(make("rwkv4"))
    ones = jax.tree.map(np.ones_like, params)
    tx = optim.optimiser(weight_decay=0.5, clip=0)
    direction = jax.jit(lambda params: tx.update(ones, tx.init(params), params)[0])(params)
    flat = lambda tree: {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)
    }
    values, directions = flat(params), flat(direction)
    assert sum(name.endswith(("time_decay", "time_first", "kernel", "embedding")) for name in values) > 4
    for name, d in directions.items():
        factor = 2 if name.endswith("time_decay") else 3 if name.endswith("time_first") else 1
        decay = 0.5 * values[name] if name.endswith(("kernel", "embedding")) else 0
        assert np.allclose(d, factor * (1 + decay), rtol=1e-5), name


def test_l2wrap_has_the_released_gradient():
    """1e-4 / (B T) * max_logit on the largest logit of each token, nothing elsewhere."""
    logits = 4 * np.random.default_rng(0).standard_normal((2, 3, 5), np.float32)
    grad = jax.jit(jax.grad(lambda x: optim.l2wrap(x).mean()))(logits)
    top = logits.max(-1, keepdims=True)
    assert np.allclose(grad, np.where(logits == top, 1e-4 / 6 * top, 0), atol=1e-9)
