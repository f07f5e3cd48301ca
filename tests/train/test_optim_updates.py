"""Schedules, learning rates by group, weight decay and the penalty on large logits."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small import drawn, make

from rwkv_jax.models import KINDS
from rwkv_jax.train import optim


def test_schedule_rises_to_lr_and_ends_at_lr_end():
    fields = {"lr": 1e-3, "lr_end": 1e-5, "steps": 100, "warmup": 10}
    lr = optim.schedule("exponential", **fields, decay_start=80)
    assert lr(0) == pytest.approx(1e-4) and lr(9) == lr(50) == lr(79 - 1) == 1e-3
    assert lr(99) == pytest.approx(1e-5) and lr(89) == pytest.approx(1e-4, rel=1e-6)
    cosine = optim.schedule("cosine", **fields)
    assert cosine(99) == pytest.approx(1e-5) and cosine(54) == pytest.approx(5.05e-4, rel=1e-2)
    constant = optim.schedule("constant", **fields)
    assert [constant(i) for i in (0, 4, 9, 99)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3])


def test_default_lr_interpolates_the_table_in_log_log():
    (d1, lr1), (d2, lr2) = KINDS["rwkv4"].learning_rates[:2]
    assert [optim.default_lr("rwkv4", dim) for dim in (1, d1, d2)] == pytest.approx([lr1, lr1, lr2])
    assert optim.default_lr("rwkv4", d1**0.75 * d2**0.25) == pytest.approx(lr1**0.75 * lr2**0.25)


def test_default_lr_of_a_kind_with_one_rate_is_that_rate(monkeypatch):
    monkeypatch.setitem(KINDS, "one", dataclasses.replace(KINDS["rwkv4"], learning_rates=((128, 1e-3),)))
    assert [optim.default_lr("one", dim) for dim in (1, 128, 999)] == [1e-3] * 3


@pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])
def test_default_lr_of_later_versions_falls_with_the_width(kind):
    rates = [optim.default_lr(kind, dim) for dim in (8, 32, 100, 128, 512, 768, 1000, 2048, 3000, 4096, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == rates[1] and rates[-2] == rates[-1] and 5e-5 < rates[-1] < 20e-5
    assert 1e-3 < rates[3] < 2e-2  # at 128 channels


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("rwkv4", {"time_decay": 2, "time_first": 3}),
        pytest.param("rwkv5", {"time_decay": 2}, marks=pytest.mark.slow),
        pytest.param("rwkv6", {"time_decay": 2}, marks=pytest.mark.slow),
        ("rwkv7", {"w0": 2}),
    ],
)
def test_optimiser_applies_rates_and_decay_to_the_named_parameters(kind, own):
    """Multipliers for decays and bonuses, 5 for the head. Decoupled decay applies to matrices only, and not to the
    matrices of low-rank maps."""
    _, params = drawn(make(kind))
    ones = jax.tree.map(np.ones_like, params)
    tx = optim.optimiser(weight_decay=0.5, clip=0, groups=(*optim.released_groups(), ("^head/", 5.0)))
    direction = jax.jit(lambda params: tx.update(ones, tx.init(params), params)[0])(params)
    values, directions = flatten_dict(params, sep="/"), flatten_dict(direction, sep="/")
    assert all(any(name.endswith(ending) for name in values) for ending in (*own, "kernel", "embedding"))
    for name, d in directions.items():
        factors = own | {"head/kernel": 5}
        factor = next((x for ending, x in factors.items() if name.endswith(ending)), 1)
        decay = 0.5 * values[name] if name.endswith(("kernel", "embedding")) else 0
        assert np.allclose(d, factor * (1 + decay), rtol=1e-5), name
