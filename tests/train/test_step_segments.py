"""State carried over segments and steps: gradients against a loop by hand, every strategy, skipped steps.

The fast tests differentiate a model that decays its past, which compiles in a second, and RWKV-4 once.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import V, drawn, made, make

from rwkv_jax import train
from rwkv_jax.models import layers
from rwkv_jax.train import optim, parallel
from rwkv_jax.train.step import Objective, TrainState, mean_gradient

B, T, K = 8, 12, 3  # segments of 4
EXACT = {"segments": K}
TRUNCATED = {"segments": K, "stop_gradient": True}


class Recurrence(nn.Module):
    @nn.compact
    def __call__(self, x_BTD, reset_BT, h_BD):
        decay_D = jnp.exp(-jnp.exp(self.param("time_decay", nn.initializers.normal(), x_BTD.shape[-1:])))

        def step(h_BD, x_and_reset):
            x_BD, reset_B = x_and_reset
            h_BD = jnp.where(reset_B[:, None], 0, h_BD) * decay_D[None] + jnp.tanh(x_BD)
            return h_BD, h_BD

        end_BD, h_TBD = jax.lax.scan(step, h_BD, (x_BTD.swapaxes(0, 1), reset_BT.T))
        return h_TBD.swapaxes(0, 1), end_BD


class Decaying(nn.Module):
    """h_t = decay h_{t-1} + tanh(embedding of token t), with a linear head and the interface of a language model."""

    vocab_size: int = V
    dim: int = 4
    dropout: float = 0.0

    def setup(self):
        self.emb = nn.Embed(self.vocab_size, self.dim)
        self.recurrence = Recurrence()
        self.head = nn.Dense(self.vocab_size, use_bias=False)

    def hidden(self, tokens_BT, state=None, *, reset_BT=None):
        (h_BD,) = self.init_state(len(tokens_BT)) if state is None else state
        reset_BT = jnp.zeros(tokens_BT.shape, bool) if reset_BT is None else reset_BT
        h_BTD, end_BD = self.recurrence(self.emb(tokens_BT), reset_BT, h_BD)
        return layers.dropout(self, h_BTD, self.dropout), (end_BD,)

    def logits(self, x_BTD):
        return self.head(x_BTD)

    @nn.nowrap
    def aligned_head(self):
        return lambda head_params: head_params, lambda head_params, x_ND: x_ND @ head_params["kernel"]

    def __call__(self, tokens_BT, state=None, *, reset_BT=None):
        h_BTD, state = self.hidden(tokens_BT, state, reset_BT=reset_BT)
        return self.logits(h_BTD), state

    def init_state(self, batch):
        return (jnp.zeros((batch, self.dim)),)


DECAYING = Decaying()
RWKV4 = make("rwkv4")
LATER = ("rwkv5", "rwkv6", "rwkv7")
# in float64: the norm of a head amplifies the rounding of a small y
EXACTLY = {kind: make(kind, dtype="float64", param_dtype="float64") for kind in LATER}
ALL = pytest.mark.parametrize(
    "model",
    [
        pytest.param(DECAYING, id="decaying"),
        *(pytest.param(x, marks=pytest.mark.slow, id=x.layers[0]) for x in (RWKV4, *EXACTLY.values())),
    ],
)


@pytest.fixture(autouse=True)
def precision(request):
    with jax.enable_x64(request.getfixturevalue("model") in EXACTLY.values()):
        yield


@functools.cache
def _params(model):
    """Parameters with a long memory, so that a gradient across a border is not lost in rounding."""
    if model not in EXACTLY.values():
        return drawn(model)[1]
    return jax.tree.map(lambda x: x.astype(np.float64), made(model.layers[0])[1])


def _batch(seed=0, reset=0.1):
    rng = np.random.default_rng(seed)
    share_B1 = np.linspace(0.2, 1, B)[:, None]
    return {
        "tokens": rng.integers(0, V, (B, T + 1)).astype(np.int32),
        "mask": rng.random((B, T)) < share_B1,
        "reset": rng.random((B, T)) < reset,
    }


def _carry(model, seed=9):
    """A past for every row, above 0 like the sum of weights in a state of WKV."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(lambda: model.init_state(B))
    return jax.tree.map(lambda x: 0.5 + np.abs(rng.standard_normal(x.shape, np.float32)).astype(x.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, batch, state):
    """(nats [B, T], final state) without segments or gradients."""
    logits_BTV, end = model.apply({"params": params}, batch["tokens"][:, :-1], state, reset_BT=batch["reset"])
    return optim.cross_entropy(logits_BTV, batch.get("targets", batch["tokens"][:, 1:])), end


@functools.cache
def _program(model, **options):
    return jax.jit(functools.partial(mean_gradient, model, Objective(l2wrap=False, **options)))


def _gradient(model, carry=None, batch=None, **options):
    zero = np.zeros((), np.int32)
    state = TrainState(zero, _params(model), (), zero, carry=carry)
    return jax.device_get(_program(model, **options)(state, batch or _batch()))


def _by_hand(model, state, batch):
    """Gradient, loss and final state by a plain Python loop over segments, each with a gradient of its own."""

    def loss(params, rows, mask_BT, state):
        nll_BT, state = _forward(model, params, rows, state)
        return jnp.where(mask_BT, nll_BT, 0).sum(), state

    gradient, sums = jax.jit(jax.value_and_grad(loss, has_aux=True)), []
    for i in range(0, T, T // K):
        rows = {"tokens": batch["tokens"][:, i : i + T // K + 1], "reset": batch["reset"][:, i : i + T // K]}
        (value, state), grads = jax.device_get(gradient(_params(model), rows, batch["mask"][:, i : i + T // K], state))
        sums.append((grads, value))
    grads, value = jax.tree.map(lambda *x: sum(x) / batch["mask"].sum(), *sums)
    return grads, value, state


def _assert_close(actual, expected, bound=1e-5):
    errors = jax.tree.map(error_ratio, actual, expected)
    assert max(jax.tree.leaves(errors)) < bound, errors


@pytest.mark.parametrize(
    ("model", "carried"),
    [
        pytest.param(DECAYING, False, id="decaying"),
        pytest.param(RWKV4, True, id="rwkv4-carried"),
        *(pytest.param(EXACTLY[kind], True, marks=pytest.mark.slow, id=f"{kind}-carried") for kind in LATER),
    ],
)
def test_mean_gradient_over_segments_without_stop_equals_the_whole(model, carried):
    carry = _carry(model) if carried else None
    segments, whole = _gradient(model, carry, **EXACT), _gradient(model, carry)
    _assert_close(segments, whole)
    assert (segments[2] is None) == (whole[2] is None) == (not carried)


@ALL
def test_mean_gradient_over_segments_with_stop_equals_a_loop_by_hand(model):
    carry = _carry(model)
    grads, loss, end = _gradient(model, carry, **TRUNCATED)
    _assert_close((grads, loss, end), _by_hand(model, carry, _batch()))
    whole = _gradient(model, carry)
    assert error_ratio(loss, whole[1]) < 1e-6  # the same forward pass
    assert max(jax.tree.leaves(jax.tree.map(error_ratio, grads, whole[0]))) > 1e-2  # another gradient


@ALL
def test_mean_gradient_and_carry_of_accumulated_segments_equal_all_rows(model):
    carry = _carry(model)
    _assert_close(_gradient(model, carry, accumulation=2, **TRUNCATED), _gradient(model, carry, **TRUNCATED))


@pytest.mark.parametrize("model", [DECAYING])
def test_mean_gradient_takes_the_targets_of_a_batch_over_its_next_tokens(model):
    carry, batch = _carry(model), _batch()
    batch["targets"] = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    nll_BT = np.asarray(_forward(model, _params(model), batch, carry)[0])
    grads, loss, _ = _gradient(model, carry, batch, accumulation=2, **EXACT)
    assert loss == pytest.approx(float(nll_BT[batch["mask"]].mean()), rel=1e-6)
    _assert_close(grads, _gradient(model, carry, batch)[0])
    batch["tokens"] = np.concatenate([batch["tokens"][:, :-1], batch["tokens"][:, :1]], axis=1)
    assert _gradient(model, carry, batch)[1] == pytest.approx(float(loss), rel=1e-6)  # the last token is no input


@ALL
def test_mean_gradient_carry_continues_rows_until_a_reset(model):
    """Two steps of T with the state carried over equal one of 2·T. A reset at a row's first token drops the past of
    that row alone."""
    first, second = _batch(1), _batch(2)
    second["tokens"][:, 0] = first["tokens"][:, -1]
    empty = jax.device_get(model.init_state(B))
    _, _, end = _gradient(model, empty, first)
    _, loss, _ = _gradient(model, end, second)
    both = {
        "tokens": np.concatenate([first["tokens"][:, :-1], second["tokens"]], axis=1),
        "reset": np.concatenate([first["reset"], second["reset"]], axis=1),
    }
    nll_BT = np.asarray(_forward(model, _params(model), both, empty)[0])[:, T:]
    assert loss == pytest.approx(float(nll_BT[second["mask"]].mean()), rel=1e-6)

    fresh = second | {"reset": second["reset"].copy()}
    fresh["reset"][:, 0] = True
    with_past, without = (_gradient(model, carry, fresh)[1] for carry in (end, empty))
    assert with_past == pytest.approx(float(without), rel=1e-6)
    assert abs(loss - with_past) > 1e-3


# ---------------------------------------------------------------------------------------------------- steps


@functools.cache
def _steps(model, strategy, **options):
    """(state, losses) of three steps, and the carry before the third. A large eps keeps Adam from turning rounding
    into +-lr."""
    tx = optim.optimiser(eps=1e-3)
    step = train.make_step(model, tx, **options)
    init, step, put = parallel.STRATEGIES[strategy](train.make_init(model, tx, carry_rows=B), step)
    state, losses = init(jax.random.key(0)), []
    for seed in range(3):
        state, values = step(state, put(_batch(seed)), np.float32(1e-2))
        losses.append(float(values["loss_nats"]))
    return state, losses


@ALL
@pytest.mark.parametrize(("strategy", "accumulation"), [("pmap", 1), ("fsdp", 2)])
def test_strategies_carry_the_state_of_rows_alike(strategy, accumulation, model):
    state, losses = _steps(model, strategy, accumulation=accumulation, **TRUNCATED)
    reference, expected = _steps(model, "single", **TRUNCATED)
    assert losses == pytest.approx(expected, rel=1e-5)
    _assert_close(*(jax.device_get((x.carry, x.params)) for x in (state, reference)))
    for x in jax.tree.leaves(state.carry):
        assert {shard.data.shape[0] for shard in x.addressable_shards} == {B // jax.device_count()}


@ALL
def test_step_that_is_not_finite_keeps_the_carry(model):
    tx, carry, zero = optim.optimiser(), _carry(model), np.zeros((), np.int32)
    moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, _params(model)))
    state = TrainState(zero, _params(model), moments, zero, carry=carry)
    step = jax.jit(train.make_step(model, tx))
    spoilt = _params(model) | {"head": jax.tree.map(lambda x: np.full_like(x, np.nan), _params(model)["head"])}
    bad, _ = step(state.replace(params=spoilt), _batch(), 1e-2)
    assert bad.skipped == 1 and jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(bad.carry), carry))
    good, _ = step(state, _batch(), 1e-2)
    assert not np.array_equal(jax.tree.leaves(good.carry)[0], jax.tree.leaves(carry)[0])
    # a batch without targets, such as a long prompt, updates the carry but not the parameters
    silent, _ = step(state, _batch() | {"mask": np.zeros((B, T), bool)}, 1e-2)
    assert silent.skipped == 1
    jax.tree.map(
        np.testing.assert_array_equal, *jax.device_get(((silent.params, silent.carry), (state.params, good.carry)))
    )


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("model", [Decaying(dropout=0.5)], ids=["decaying"])
def test_dropout_draws_new_masks_for_steps_seeds_and_parts_of_a_batch(model):
    """Parts are micro-batches, segments and devices, all with the same text: under one mask they had equal losses."""
    params, steps_and_seeds = _params(model), ((0, 0), (1, 0), (0, 1))
    ids = np.tile(np.arange(4, dtype=np.int32), 3)[None, :9]
    whole, halves = np.ones((1, 8), bool), np.arange(8)[None] < 4
    rows = np.concatenate([whole, ~whole])

    def loss(ids, mask, step=0, axis_name=None, model=model, **options):
        batch = {"tokens": ids, "mask": mask, "reset": np.arange(mask.shape[1])[None].repeat(len(ids), 0) % 4 == 0}
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero + step, params, (), zero)
        return mean_gradient(model, Objective(**options), state, batch, axis_name)[1]

    def on_two_devices(mask):
        return jax.vmap(functools.partial(loss, axis_name="d"), axis_name="d")(np.stack([ids] * 2), mask)[0]

    @jax.jit
    def losses():
        alone = [loss(ids, whole, step, seed=seed) for step, seed in steps_and_seeds]
        parts = {
            "micro-batches": [loss(ids.repeat(2, 0), mask, accumulation=2) for mask in (rows, ~rows)],
            "segments": [loss(ids, mask, segments=2) for mask in (halves, ~halves)],
            "devices": [on_two_devices(mask[:, None]) for mask in (rows, ~rows)],
        }
        return [loss(ids, whole, model=DECAYING), *alone], parts

    alone, parts = jax.device_get(losses())
    assert np.diff(np.sort(alone)).min() > 1e-4
    assert all(abs(first - second) > 1e-4 for first, second in parts.values()), parts
