"""Strategies agree with one another, compile once, and split what they should split."""

import functools
import re
from dataclasses import dataclass
from types import SimpleNamespace

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


@dataclass
class Run:
    """Two steps, and a third with nothing to learn from: its loss is 0 / 0."""

    born: train.TrainState  # donated to the first step
    states: list  # after the second step and the third, on the host
    rows: list  # metrics of each step
    traces: int
    state: train.TrainState  # the last, where it lives


@functools.cache
def _run(strategy, accumulation, replicas):
    """One program for every test that looks at it. A large eps keeps Adam from turning rounding into +-lr."""
    model, tx, traces = _model(), optim.optimiser(eps=1e-3), []
    step = train.make_step(model, tx, accumulation=accumulation)

    def traced(*args, **kwargs):
        traces.append(1)
        return step(*args, **kwargs)

    init, step_, put = parallel.STRATEGIES[strategy](train.make_init(model, tx), traced, replicas=replicas)
    *good, bad = _batches(3)
    bad["mask"][:] = False
    born = state = init(jax.random.key(0))
    rows, states = [], []
    for batch in (*good, bad):
        state, values = step_(state, put(batch), np.float32(1e-2))
        rows.append(jax.device_get(values))
        states.append(jax.tree.map(np.array, state))
    return Run(born, states[1:], rows, len(traces), state)


# Accumulation is the same code under every strategy, and so is everything else of one where it accumulates.
RUNS = [("single", 1, 1), ("pmap", 4, 1), ("fsdp", 4, 1), ("fsdp", 1, 2)]


@pytest.mark.parametrize("run", RUNS[1:], ids=str)
def test_strategies_and_accumulation_agree_under_ragged_masks(run):
    run, reference = _run(*run), _run(*RUNS[0])
    for row, wanted in zip(run.rows[:2], reference.rows[:2], strict=True):
        assert row["loss_nats"] == pytest.approx(wanted["loss_nats"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    errors = jax.tree.map(error_ratio, run.states[0].params, reference.states[0].params)
    assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_step_is_traced_once_and_takes_the_memory_of_the_state_before(run):
    run = _run(*run)
    assert run.traces == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(run.born))


def test_the_loss_is_the_mean_over_all_masked_in_targets():
    """A mean of per-row means would give every row the same weight."""
    model, batch = _model(), _batches(1)[0]
    params = jax.jit(train.make_init(model, optim.optimiser()))(jax.random.key(0)).params
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, batch["tokens"][:, :-1])
    logp = jax.nn.log_softmax(logits_BTV)
    nll_BT = -np.take_along_axis(np.asarray(logp), batch["tokens"][:, 1:, None], axis=2)[..., 0]
    assert _run(*RUNS[0]).rows[0]["loss_nats"] == pytest.approx(nll_BT[batch["mask"]].mean(), rel=1e-6)


def test_the_devices_of_pmap_hold_the_same_bits():
    for x in jax.tree.leaves(_run("pmap", 4, 1).state):
        first, *others = (np.asarray(s.data) for s in x.addressable_shards)
        assert len(others) == 3
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("run, width", [(("fsdp", 4, 1), 64), (("fsdp", 1, 2), 128)])
def test_fsdp_splits_parameters_and_optimiser_and_never_the_layer_axis(run, width):
    """Over the devices of a replica: 4, or 2 of 4."""
    state = _run(*run).state
    kernels = [state.params["blocks"]["ffn"]["key"]["kernel"], state.opt_state[1].mu["blocks"]["ffn"]["key"]["kernel"]]
    for kernel in kernels:
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 64, width)}
    assert state.params["blocks"]["ln1"]["scale"].sharding.is_fully_replicated


def _activations_gathered(program):
    text = program.as_text()
    of_all_rows = rf"f32\[(?:{B},{T}|{B * T}),\d+\]\S* all-gather\("
    return re.findall(of_all_rows, text), re.findall(r" all-gather\(", text)


@pytest.mark.parametrize("name, replicas", [("rwkv4", 2), ("transformer", 1)])
def test_fsdp_gathers_weights_and_leaves_the_batch_split(name, replicas):
    model, tx = _model(name), optim.optimiser()
    raw = train.make_step(model, tx)
    init, step, put = parallel.fsdp(train.make_init(model, tx), raw, replicas=replicas)
    state, batch = init(jax.random.key(0)), put(_batches(1)[0])
    program = step.lower(state, batch, np.float32(1e-2)).compile()
    activations, gathers = _activations_gathered(program)
    assert gathers and not activations
    of_a_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == of_a_device  # donated

    if replicas == 1:
        shardings = jax.tree.map(lambda x: x.sharding, (state, batch))
        unannotated = jax.jit(
            lambda *args: raw(*args), in_shardings=(*shardings, None), out_shardings=(shardings[0], None)
        )
        program = unannotated.lower(state, batch, np.float32(1e-2)).compile()
        assert _activations_gathered(program)[0]  # what the annotation is there to prevent


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(run):
    run = _run(*run)
    before, after = run.states
    same = jax.tree.map(np.array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert jax.tree.all(same)
    assert int(after.step) == 3 and int(run.rows[-1]["skipped"]) == 1


@pytest.mark.parametrize(
    "replicas, expected",
    [
        (1, [[0, 0, 1, 1, 2, 2, 3, 3]]),
        (2, [[0, 0, 1, 1], [2, 2, 3, 3]]),
        (4, [[0, 0], [1, 1], [2, 2], [3, 3]]),
        (8, [[0], [0], [1], [1], [2], [2], [3], [3]]),
    ],
)
def test_replicas_hold_as_few_slices_as_can_be(replicas, expected):
    """Slices cannot be had on one machine: devices that only say which one they are in."""
    devices = [SimpleNamespace(slice_index=i % 4, platform="cpu", device_kind="cpu") for i in range(8)]
    grid = parallel._grid(devices, replicas)
    assert [[device.slice_index for device in row] for row in grid] == expected


@pytest.mark.parametrize("replicas, strategy, expected", [(3, "fsdp", "a divisor of the 4"), (2, "pmap", "1 with")])
def test_replicas_that_cannot_be_are_one_line(replicas, strategy, expected):
    with pytest.raises(ValueError, match=f"replicas is {replicas}, expected {expected}"):
        parallel.check_divisible(24, 1, strategy, replicas)


@pytest.mark.parametrize("batch_size, accumulation, strategy", [(6, 1, "pmap"), (8, 4, "fsdp"), (3, 2, "single")])
def test_a_batch_that_cannot_be_split_is_one_line(batch_size, accumulation, strategy):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected a multiple of"):
        parallel.check_divisible(batch_size, accumulation, strategy)


def test_an_unknown_strategy_is_one_line():
    with pytest.raises(ValueError, match="strategy is 'ddp', expected one of single, pmap, fsdp"):
        parallel.check_divisible(8, 1, "ddp")
