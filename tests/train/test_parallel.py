"""SPMD strategies on four virtual devices: they agree with one another, compile once, and split their arrays."""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from judge import error_ratio
from small import drawn, forward

from rwkv_jax import models, train
from rwkv_jax.train import optim, parallel

B, T, V, D = 16, 8, 64, 16


@pytest.fixture(scope="module", autouse=True)
def leaves_of_512_elements_are_split():
    """Lowers the limit of `fsdp`: at its default no leaf of this small model would be split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "MIN_SHARDED", 2**9)
        yield


# Most of a step's program is the optimiser's arithmetic on each leaf: this model has few of them.
FEW_LEAVES = {"num_layers": 1, "scan": False, "receptance": False, "token_shift": False, "embedding_norm": False}
MODEL = models.build("rwkv4", vocab_size=V, dim=D, matmul_precision="highest", **FEW_LEAVES)


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
    """Two steps, and a third without targets: its loss is 0 / 0."""

    born: train.TrainState  # donated to the first step
    states: list  # after the second step and the third, on the host
    rows: list  # metrics of each step
    traces: int
    state: train.TrainState  # the last, where it lives
    program: Any  # the compiled step of fsdp


def _run(strategy, accumulation, replicas, model=MODEL):
    with jax.enable_x64(model.param_dtype == "float64"):
        return _run_once(strategy, accumulation, replicas, model)


@functools.cache
def _run_once(strategy, accumulation, replicas, model):
    """One program for all tests of a strategy. A large eps keeps Adam from turning rounding into +-lr."""
    (model, params), tx, traces = drawn(model), optim.optimiser(eps=1e-3), []
    step = train.make_step(model, tx, accumulation=accumulation)
    zero = np.zeros((), np.int32)

    def traced(*args, **kwargs):
        traces.append(1)
        return step(*args, **kwargs)

    init, step_, put = parallel.STRATEGIES[strategy](
        lambda key: train.TrainState(zero, params, tx.init(params), zero), traced, replicas=replicas
    )
    *good, bad = _batches(3)
    bad["mask"][:] = False
    born = state = init(jax.random.key(0))
    lr = np.float32(1e-2)
    program = step_.lower(born, put(good[0]), lr).compile() if strategy == "fsdp" else None
    rows, states = [], []
    for batch in (*good, bad):
        state, values = step_(state, put(batch), lr)
        rows.append(jax.device_get(values))
        states.append(jax.tree.map(np.array, state))
    return Run(born, states[1:], rows, len(traces), state, program)


# Accumulation is the same code under every strategy, so one combination with it is enough.
SINGLE, PMAP, FSDP = ("single", 1, 1), ("pmap", 4, 1), ("fsdp", 1, 2)


def test_single_runs_on_the_default_device_and_commits_its_state_to_it():
    init, step, _ = parallel.single(lambda key: {"w": jax.random.normal(key, (3,))}, lambda state: state)
    for device in jax.devices()[:2]:
        with jax.default_device(device):
            state = step(init(jax.random.key(0)))
        assert state["w"].devices() == {device} and state["w"].committed


def _later(kind):
    """Computed in float64: the norm of a head amplifies the rounding of a small y."""
    return models.build(kind, vocab_size=V, num_layers=3, dim=D, head_size=8, dtype="float64", param_dtype="float64")


MODELS = [
    pytest.param(MODEL, id="rwkv4"),
    *(pytest.param(_later(kind), marks=pytest.mark.slow, id=kind) for kind in ("rwkv5", "rwkv6", "rwkv7")),
]


@pytest.mark.parametrize("run", [PMAP, FSDP], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_strategies_agree_with_and_without_accumulation_under_ragged_masks(model, run):
    of_loss, of_rest = (1e-6, 1e-5) if model is MODEL else (1e-12, 1e-12)
    run, reference = _run(*run, model), _run(*SINGLE, model)
    for row, wanted in zip(run.rows[:2], reference.rows[:2], strict=True):
        assert row["loss_nats"] == pytest.approx(wanted["loss_nats"], rel=of_loss)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=of_rest)
    errors = jax.tree.map(error_ratio, run.states[0].params, reference.states[0].params)
    assert max(jax.tree.leaves(errors)) < of_rest


@pytest.mark.parametrize("run", [SINGLE, PMAP, FSDP], ids=str)
def test_strategies_trace_once_donate_the_state_and_skip_non_finite_steps(run):
    run = _run(*run)
    assert run.traces == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(run.born))
    before, after = run.states
    same = jax.tree.map(np.array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert jax.tree.all(same)
    assert int(after.step) == 3 and int(run.rows[-1]["skipped"]) == 1


def test_step_loss_is_the_mean_over_all_targets_of_the_mask():
    """A mean of per-row means would give every row the same weight."""
    run, batch = _run(*SINGLE), _batches(1)[0]
    logits_BTV = np.asarray(forward(*drawn(MODEL), batch["tokens"][:, :-1])[0], np.float64)
    chosen_BT = np.take_along_axis(logits_BTV, batch["tokens"][:, 1:, None], axis=2)[..., 0]
    nll_BT = np.log(np.exp(logits_BTV).sum(-1)) - chosen_BT
    assert run.rows[0]["loss_nats"] == pytest.approx(nll_BT[batch["mask"]].mean(), rel=1e-6)


def test_pmap_keeps_bit_equal_state_on_all_devices():
    for x in jax.tree.leaves(_run(*PMAP).state):
        first, *others = (np.asarray(s.data) for s in x.addressable_shards)
        assert len(others) == 3
        assert all(np.array_equal(first, other) for other in others)


# ---------------------------------------------------------------------------------------------- fsdp


def test_fsdp_splits_parameters_and_moments_over_the_devices_of_a_replica():
    """Splits 4 D channels over 2 of the 4 devices."""
    state = _run(*FSDP).state
    for tree in (state.params, state.opt_state[1].mu):
        kernel = tree["blocks_0"]["ffn"]["key"]["kernel"]
        assert {s.data.shape for s in kernel.addressable_shards} == {(D, 2 * D)}
    assert state.params["blocks_0"]["ln1"]["scale"].sharding.is_fully_replicated


@pytest.mark.parametrize("replicas, first", [(1, 16), (2, 32)])
def test_fsdp_splits_the_largest_axis_but_never_the_axis_of_layers(replicas, first):
    leaves = {"emb": (64, 12), "blocks": (64, 12, 5), "odd": (65, 63), "small": (64,)}
    init, _, _ = parallel.fsdp(
        lambda key: {name: np.zeros(shape) for name, shape in leaves.items()}, lambda *args: args, None, replicas
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    of_a_device = {name: x.sharding.shard_shape(x.shape) for name, x in shapes.items()}
    assert of_a_device == leaves | {"emb": (first, 12), "blocks": (64, 12 * first // 64, 5)}


@pytest.mark.parametrize("model", MODELS)
def test_fsdp_gathers_weights_and_leaves_the_batch_split(model):
    run = _run(*FSDP, model)
    text = run.program.as_text()
    assert re.findall(r" all-gather\(", text)
    # activations of all rows, by channel or by head
    assert not re.findall(rf"f(?:32|64)\[(?:{B},{T}|{B * T})(?:,\d+)+\]\S* all-gather\(", text)
    of_a_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.state))
    assert run.program.memory_analysis().alias_size_in_bytes == of_a_device  # donated


# ------------------------------------------------------------------------------------------------ meshes, mistakes


class Device:
    """A stand-in device with a slice index, since one machine has no slices."""

    platform = device_kind = "cpu"

    def __init__(self, slice_index):
        self.slice_index = slice_index


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_grid_gives_a_replica_as_few_slices_as_possible(replicas):
    grid = parallel._grid([Device(i % 4) for i in range(8)], replicas)
    slices = np.array([[device.slice_index for device in row] for row in grid])
    np.testing.assert_array_equal(slices, np.repeat(np.arange(4), 2).reshape(replicas, -1))


@pytest.mark.parametrize(
    "batch_size, accumulation, strategy, replicas, expected",
    [
        (24, 1, "fsdp", 3, "replicas is 3, expected a divisor of the 4"),
        (24, 1, "pmap", 2, "replicas is 2, expected 1 with"),
        (8, 4, "fsdp", 1, "batch_size is 8, expected a multiple of 16"),
        (3, 2, "single", 1, "batch_size is 3, expected a multiple of 2"),
        (8, 1, "ddp", 1, "strategy is 'ddp', expected one of single, pmap, fsdp"),
    ],
)
def test_check_divisible_names_a_batch_that_cannot_be_split(batch_size, accumulation, strategy, replicas, expected):
    with pytest.raises(ValueError, match=expected):
        parallel.check_divisible(batch_size, accumulation, strategy, replicas)
