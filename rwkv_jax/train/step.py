"""The state of a run and one step of it: pure functions that every strategy runs."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from rwkv_jax.models.layers import on_own_rows
from rwkv_jax.train import optim
from rwkv_jax.train.methods import FULL, Method


class TrainState(struct.PyTreeNode):
    step: jax.Array  # steps taken, including skipped ones
    params: dict
    opt_state: tuple
    skipped: jax.Array  # steps with a non-finite loss or gradient, or without a target: they changed nothing
    frozen: Any = None  # parameters that the run uses but does not train
    carry: tuple | None = None  # recurrent state of the batch's rows, where it is carried from step to step


def stored(state: TrainState) -> dict:
    """Fields of a state that a checkpoint holds: all but frozen parameters and those that are None."""
    return {name: x for name, x in vars(state).items() if x is not None and name != "frozen"}


class Objective(NamedTuple):
    """Options of a step's gradient.

    With `segments` k the T tokens are processed as k segments of T / k, recurrent state passed on, in the memory of
    one segment: truncated back-propagation through time with `stop_gradient`, else the full gradient at the cost of a
    second forward pass. The first segment starts from the state's `carry`, if any, without gradient.
    """

    method: Method = FULL
    accumulation: int = 1  # micro-batches
    segments: int = 1
    stop_gradient: bool = False  # between segments
    seed: int = 0  # of dropout
    l2wrap: bool = True
    loss_chunk: int | None = None  # see `optim.losses_of_head`


class Sums(NamedTuple):
    """Sums over some targets, to be divided once by the number of all."""

    nll: jax.Array  # of the masked-in targets, nats
    count: jax.Array  # masked-in targets


def make_init(model, tx, method=FULL, carry_rows=None):
    """`init(key) -> TrainState`, with the empty state of `carry_rows` rows where a number is given."""

    def init(key):
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        params, frozen = method.split(model, params, key)
        zero = jnp.zeros((), jnp.int32)
        carry = None if carry_rows is None else model.init_state(carry_rows)
        return TrainState(zero, params, tx.init(params), zero, frozen, carry)

    return init


def make_step(model, tx, **options):
    """Return `step(state, batch, lr, axis_name=None) -> (state, metrics)`. Options are the fields of `Objective`.

    A batch is a dict of `tokens` [B, T+1], `mask` [B, T], True for targets that count, and, where documents matter,
    `reset` [B, T]. Targets are the tokens that follow the inputs, or the batch's `targets` [B, T] if it has them.

    Metrics are scalars: `loss_nats`, the mean over the targets; `grad_norm`, the L2 norm before clipping; `skipped`,
    the skipped steps so far; `targets`, the number of targets of this step.
    """
    objective = Objective(**options)

    def step(state, batch, lr, axis_name=None):
        grads, loss, carry = mean_gradient(model, objective, state, batch, axis_name)
        new, values = apply_gradient(tx, state, grads, loss, lr)
        targets = batch["mask"].sum()
        values["targets"] = targets if axis_name is None else jax.lax.psum(targets, axis_name)
        # a batch without targets is skipped, but its text still advances the carry
        taken = (new.skipped == state.skipped) | (values["targets"] == 0)
        return new.replace(carry=jax.tree.map(lambda x, old: jnp.where(taken, x, old), carry, state.carry)), values

    return step


def mean_gradient(model, objective, state, batch, axis_name=None):
    """(gradient, loss in nats, carry after the batch).

    Loss and gradient are sums, divided once by the number of masked-in targets of the whole step: over micro-batches
    and devices too, so that neither changes the meaning of a ragged mask.
    """
    key = jax.random.fold_in(jax.random.key(objective.seed), state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    gradient = gradient_of_batch if objective.accumulation == 1 else gradient_of_micro_batches
    grads, (sums, carry) = gradient(model, objective, state.params, state.frozen, batch, state.carry, key)
    if axis_name is not None:
        grads, sums = jax.lax.psum((grads, sums), axis_name)
    return jax.tree.map(lambda g: g / sums.count, grads), sums.nll / sums.count, carry


def gradient_of_micro_batches(model, objective, trained, frozen, batch, carry, key):
    """`gradient_of_batch` summed over micro-batches in turn."""
    A = objective.accumulation
    apart = lambda x: x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1)
    together = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    gradient = partial(gradient_of_batch, model, objective, trained, frozen)

    def add(total, micro_batch):
        i, batch, carry = micro_batch
        grads, (sums, carry) = gradient(batch, carry, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, (grads, sums)), carry

    micro_batches = (jnp.arange(A), *jax.tree.map(apart, (batch, carry)))
    first = jax.tree.map(lambda x: x[0], micro_batches[1:])
    grads, (sums, _) = jax.eval_shape(gradient, *first, key)
    (grads, sums), carry = jax.lax.scan(add, _zeros((grads, sums)), micro_batches)
    return grads, (sums, jax.tree.map(together, carry))


def gradient_of_batch(model, objective, trained, frozen, batch, carry, key):
    """(gradient of the objective's sum, float32 at least for any parameters, (`Sums`, carry after the batch))."""
    loss = partial(loss_of_batch, model, objective)
    operands = (trained, frozen, batch, carry, key)
    if objective.segments == 1:
        return _gradient(loss, *operands)
    if objective.stop_gradient:
        return over_segments(partial(_gradient, loss), model, objective.segments, *operands)
    segments = partial(over_segments, jax.checkpoint(loss, prevent_cse=False), model, objective.segments)
    return _gradient(segments, *operands)


def _gradient(loss, *operands):
    grads, sums_and_carry = jax.grad(loss, has_aux=True)(*operands)
    return optim.wide(grads), sums_and_carry


def loss_of_batch(model, objective, trained, frozen, batch, carry, key):
    """(sum of the objective, (`Sums`, state after the batch, None without `carry`))."""
    tokens_BT, mask_BT = batch["tokens"], batch["mask"]
    params, initial = objective.method.bind(model, trained, frozen, len(tokens_BT))
    x_BTD, end = model.apply(
        {"params": params},
        tokens_BT[:, :-1],
        initial if carry is None else carry,
        reset_BT=batch.get("reset"),
        rngs={"dropout": key} if model.dropout else None,
        method="hidden",
    )
    with jax.named_scope("loss"):
        total, nll = losses_of_rows(model, objective, params["head"], x_BTD, targets_of(batch), mask_BT)
    return total, (Sums(nll, mask_BT.sum()), end if carry else None)


def targets_of(batch):
    """Return the labels [B, T] of a batch's inputs: its own, or else the tokens that follow them."""
    return batch.get("targets", batch["tokens"][:, 1:])


def losses_of_rows(model, objective, head_params, x_BTD, targets_BT, mask_BT):
    """(objective, nll): sums over the masked-in targets.

    Every device gathers the head once and processes its own rows in chunks: the head's gradient is reduced once too.
    """
    pad, logits = model.aligned_head()
    chunked = {"chunk": objective.loss_chunk, "penalised": objective.l2wrap}

    def losses(head_params, rows):
        sums = optim.losses_of_head(logits, pad(head_params), *rows, **chunked)
        return jax.tree.map(lambda x: x[None], sums)

    return jax.tree.map(jnp.sum, on_own_rows(losses)(head_params, (x_BTD, targets_BT, mask_BT)))


def over_segments(f, model, segments, trained, frozen, batch, carry, key):
    """`f`, the value and `Sums` of a batch, summed over segments of its rows, recurrent state passed on."""
    rows, length = batch["tokens"].shape[0], batch["mask"].shape[1] // segments
    windows = np.arange(segments)[:, None] * length + np.arange(length + 1)
    pieces = {name: x.reshape(rows, segments, length).swapaxes(0, 1) for name, x in batch.items() if name != "tokens"}
    pieces["tokens"] = batch["tokens"][:, windows].swapaxes(0, 1)
    start = model.init_state(rows) if carry is None else carry

    def one(total_and_state, i_and_piece):
        (total, state), (i, piece) = total_and_state, i_and_piece
        value, (sums, state) = f(trained, frozen, piece, state, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, total, (value, sums)), state), None

    value, (sums, _) = jax.eval_shape(f, trained, frozen, jax.tree.map(lambda x: x[0], pieces), start, key)
    ((value, sums), end), _ = jax.lax.scan(one, (_zeros((value, sums)), start), (jnp.arange(segments), pieces))
    return value, (sums, None if carry is None else end)


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@jax.named_scope("optimiser")
def apply_gradient(tx, state, grads, loss, lr):
    """(state after a step along `grads`, unchanged where they or the loss are not finite, the step's metrics)."""
    grad_norm = optax.tree.norm(grads)
    direction, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, direction)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(direction))
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    values = {"loss_nats": loss, "grad_norm": grad_norm, "skipped": skipped}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, skipped=skipped), values
