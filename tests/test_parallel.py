"""Strategies agree with one another, compile once, and split what they should split."""

import functools
import re

import jax
import numpy as np
import pytest
from judge import error_ratio

from rwkv_jax import models, optim, parallel, train

B, T, V = 16, 24, 64


def _model(name="rwkv4", **fields):
    return models.build(name, vocab_size=V, num_layers=2, dim=64, matmul_precision="highest", **fields)


def _batches(steps=2):
    """Masks that differ by row: a mean of per-device means would be wrong."""
    rng = np.random.default_rng(0)
    share_B1 = np.linspace(0.05, 1, B)[:, None]
    return [
        {"tokens": rng.integers(0, V, (B, T + 1)).astype(np.int32), "mask": rng.random((B, T)) < share_B1}
        for _ in range(steps)
    ]


def _run(strategy, accumulation=1, model=None, batches=None, eps=1e-3):
    """Final state, metrics of each step, traces. A large eps keeps Adam from turning rounding into +-lr."""
    model, tx, traces = model or _model(), optim.optimiser(eps=eps), []
    step = train.make_step(model, tx, accumulation=accumulation)

    def traced(*args, **kwargs):
        traces.append(1)
        return step(*args, **kwargs)

    init, step_, put = parallel.STRATEGIES[strategy](train.make_init(model, tx), traced)
    state, rows = init(jax.random.key(0)), []
    for batch in batches or _batches():
        state, values = step_(state, put(batch), np.float32(1e-2))
        rows.append(jax.device_get(values))
    return state, rows, len(traces)


_reference = functools.cache(lambda: _run("single"))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("strategy", ["single", "pmap", "fsdp"])
def test_strategies_and_accumulation_agree_under_ragged_masks(strategy, accumulation):
    state, rows, traces = _run(strategy, accumulation)
    reference, expected, _ = _reference()
    assert traces == 1
    for row, wanted in zip(rows, expected, strict=True):
        assert row["loss_nats"] == pytest.approx(wanted["loss_nats"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    errors = jax.tree.map(error_ratio, jax.device_get(state.params), jax.device_get(reference.params))
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_the_loss_is_the_mean_over_all_masked_in_targets():
    """A mean of per-row means would give every row the same weight."""
    model, batch = _model(), _batches(1)[0]
    state = jax.jit(train.make_init(model, optim.optimiser()))(jax.random.key(0))
    logits_BTV, _ = model.apply({"params": state.params}, batch["tokens"][:, :-1])
    logp = jax.nn.log_softmax(logits_BTV)
    nll_BT = -np.take_along_axis(np.asarray(logp), batch["tokens"][:, 1:, None], axis=2)[..., 0]
    for strategy in ("single", "pmap", "fsdp"):
        loss = _run(strategy, batches=[batch])[1][0]["loss_nats"]
        assert loss == pytest.approx(nll_BT[batch["mask"]].mean(), rel=1e-6)


def test_the_devices_of_pmap_hold_the_same_bits():
    state = _run("pmap")[0]
    for x in jax.tree.leaves(state):
        first, *others = (np.asarray(s.data) for s in x.addressable_shards)
        assert len(others) == 3
        assert all(np.array_equal(first, other) for other in others)


def test_fsdp_splits_parameters_and_optimiser_and_never_the_layer_axis():
    state = _run("fsdp", batches=_batches(1))[0]
    kernels = [state.params["blocks"]["ffn"]["key"]["kernel"], state.opt_state[1].mu["blocks"]["ffn"]["key"]["kernel"]]
    for kernel in kernels:
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 64, 64)}
    assert state.params["blocks"]["ln1"]["scale"].sharding.is_fully_replicated


def _activations_gathered(step, state, batch):
    text = step.lower(state, batch, np.float32(1e-2)).compile().as_text()
    of_all_rows = rf"f32\[(?:{B},{T}|{B * T}),\d+\]\S* all-gather\("
    return re.findall(of_all_rows, text), re.findall(r" all-gather\(", text)


@pytest.mark.parametrize("name", ["rwkv4", "transformer"])
def test_fsdp_gathers_weights_and_leaves_the_batch_split(name):
    model, tx = _model(name), optim.optimiser()
    raw = train.make_step(model, tx)
    init, step, put = parallel.fsdp(train.make_init(model, tx), raw)
    state, batch = init(jax.random.key(0)), put(_batches(1)[0])
    activations, gathers = _activations_gathered(step, state, batch)
    assert gathers and not activations

    shardings = jax.tree.map(lambda x: x.sharding, (state, batch))
    unannotated = jax.jit(
        lambda *args: raw(*args), in_shardings=(*shardings, None), out_shardings=(shardings[0], None)
    )
    assert _activations_gathered(unannotated, state, batch)[0]  # what the annotation is there to prevent


@pytest.mark.parametrize("strategy", ["single", "pmap", "fsdp"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(strategy):
    good, bad = _batches(2)
    bad["mask"][:] = False  # nothing to learn from: 0 / 0
    state, rows, _ = _run(strategy, batches=[good, bad])
    before = _run(strategy, batches=[good])[0]
    same = jax.tree.map(np.array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    assert jax.tree.all(same)
    assert int(state.step) == 2 and int(rows[-1]["skipped"]) == 1


@pytest.mark.parametrize("batch_size, accumulation, strategy", [(6, 1, "pmap"), (8, 4, "fsdp"), (3, 2, "single")])
def test_a_batch_that_cannot_be_split_is_one_line(batch_size, accumulation, strategy):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected a multiple of"):
        parallel.check_divisible(batch_size, accumulation, strategy)


def test_an_unknown_strategy_is_one_line():
    with pytest.raises(ValueError, match="strategy is 'ddp', expected one of single, pmap, fsdp"):
        parallel.check_divisible(8, 1, "ddp")
