"""The state of a run and one step of it: pure functions that every strategy runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from rwkv_jax import optim
from rwkv_jax.finetune import FULL
from rwkv_jax.models.layers import on_own_rows

# The loss is computed with a multiple of 8 columns of logits: with an odd number, such as 50,277, no row but the first
# begins where a GPU can load 16 bytes at once, and the product ran at 216 TFLOP/s on an H100, not at 600.
ALIGNED = 8


class TrainState(struct.PyTreeNode):
    step: jax.Array  # steps taken, counting the skipped
    params: dict
    opt_state: tuple
    skipped: jax.Array  # steps whose loss or gradient was not finite: they changed nothing
    frozen: Any = None  # parameters that the run only starts from, beside those that it trains
    carry: tuple | None = None  # recurrent state of the batch's rows, where it is handed from step to step


def stored(state: TrainState) -> dict:
    """What a checkpoint holds of a state: neither what is frozen, nor fields that the run has no use for."""
    return {name: x for name, x in vars(state).items() if x is not None and name != "frozen"}


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
    """`step(state, batch, lr, axis_name=None) -> (state, metrics)` on tokens [B, T+1], a loss mask [B, T] and, where
    documents matter, `reset` [B, T].

    Options are those of `make_gradient`.
    """
    mean_gradient = make_gradient(model, **options)

    def step(state, batch, lr, axis_name=None):
        grads, loss, carry = mean_gradient(state, batch, axis_name)
        new, values = apply_gradient(tx, state, grads, loss, lr)
        taken = new.skipped == state.skipped
        return new.replace(carry=jax.tree.map(lambda x, old: jnp.where(taken, x, old), carry, state.carry)), values

    return step


def make_gradient(
    model, *, method=FULL, accumulation=1, seed=0, l2wrap=True, loss_chunk=None, segments=1, stop_gradient=False
):
    """`mean_gradient(state, batch, axis_name=None) -> (gradient, loss in nats, carry after the batch)`.

    Loss and gradient are sums, divided once by the number of masked-in targets of the whole step: over micro-batches
    and devices too, so that neither changes what a ragged mask means. `loss_chunk`: see `optim.losses_of_head`.

    With `segments` k the T tokens are read as k segments of T / k, recurrent state handed on, in the memory of one
    segment: truncated back-propagation with `stop_gradient`, else the whole gradient at the cost of a second forward
    pass. A `carry` in the state is where the rows' first segment starts from, without gradient.
    """
    losses = _losses(model, loss_chunk, l2wrap)

    def objective(trained, frozen, batch, state, key):
        tokens_BT, mask_BT = batch["tokens"], batch["mask"]
        rngs = {"dropout": key} if model.dropout else None
        params, initial = method.bind(model, trained, frozen, len(tokens_BT))
        start, reset_BT = initial if state is None else state, batch.get("reset")
        x_BTD, end = model.apply(
            {"params": params}, tokens_BT[:, :-1], start, reset_BT=reset_BT, rngs=rngs, method="hidden"
        )
        # every device gathers the head once and chunks its own rows: the head's gradient is reduced once too
        with jax.named_scope("loss"):
            sums = on_own_rows(losses)(params["head"], (x_BTD, tokens_BT[:, 1:], mask_BT))
            total, nll = jax.tree.map(jnp.sum, sums)
        return total, (nll, mask_BT.sum(), end if state else None)

    def gradient_of(f):
        """Sums over micro-batches and devices are float32 at least, whatever the parameters are."""

        def gradient(*operands):
            grads, sums_and_end = jax.grad(f, has_aux=True)(*operands)
            return optim.wide(grads), sums_and_end

        return gradient

    if segments == 1:
        gradient = gradient_of(objective)
    elif stop_gradient:
        gradient = _in_segments(gradient_of(objective), model, segments)
    else:
        gradient = gradient_of(_in_segments(jax.checkpoint(objective, prevent_cse=False), model, segments))

    def sums(trained, frozen, batch, carry, key):
        if accumulation == 1:
            return gradient(trained, frozen, batch, carry, key)
        apart = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        micro = jax.tree.map(apart, (batch, carry))

        def add(total, i_and_rows):
            i, (batch, carry) = i_and_rows
            grads, (nll, count, carry) = gradient(trained, frozen, batch, carry, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, (grads, nll, count)), carry

        first = lambda *params: gradient(*params, *jax.tree.map(lambda x: x[0], micro), key)
        grads, (nll, count, _) = jax.eval_shape(first, trained, frozen)
        (grads, nll, count), carry = jax.lax.scan(add, _zeros((grads, nll, count)), (jnp.arange(accumulation), micro))
        together = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return grads, (nll, count, jax.tree.map(together, carry))

    def mean_gradient(state, batch, axis_name=None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        grads, (nll, count, carry) = sums(state.params, state.frozen, batch, state.carry, key)
        if axis_name is not None:
            grads, nll, count = jax.lax.psum((grads, nll, count), axis_name)
        return jax.tree.map(lambda g: g / count, grads), nll / count, carry

    return mean_gradient


def _losses(model, loss_chunk, l2wrap):
    """`losses(head_params, (x_BTD, targets_BT, mask_BT)) -> (objective, loss)` of a device's rows: sums, [1] each."""
    columns = -(-model.vocab_size // ALIGNED) * ALIGNED
    aligned, added = model.clone(vocab_size=columns), columns - model.vocab_size

    def logits(head_params, x_ND):
        logits_NV = aligned.apply({"params": {"head": head_params}}, x_ND, method="logits")
        return jnp.where((jnp.arange(columns) < model.vocab_size)[None], logits_NV, -jnp.inf) if added else logits_NV

    def losses(head_params, rows):
        of_vocabulary = lambda x: x.shape[1] == model.vocab_size  # all but the low side of an adapter
        wider = lambda x: jnp.pad(x, ((0, 0), (0, added))) if of_vocabulary(x) else x
        head_params = jax.tree.map(wider, head_params)
        sums = optim.losses_of_head(logits, head_params, *rows, chunk=loss_chunk, penalised=l2wrap)
        return jax.tree.map(lambda x: x[None], sums)

    return losses


def _in_segments(f, model, segments):
    """`f` on one segment of the rows after the other: its sums added up, recurrent state handed on."""

    def run(trained, frozen, batch, carry, key):
        rows, length = batch["tokens"].shape[0], batch["mask"].shape[1] // segments
        windows = np.arange(segments)[:, None] * length + np.arange(length + 1)
        pieces = {
            name: x.reshape(rows, segments, length).swapaxes(0, 1) for name, x in batch.items() if name != "tokens"
        }
        pieces["tokens"] = batch["tokens"][:, windows].swapaxes(0, 1)
        start = model.init_state(rows) if carry is None else carry

        def one(total_and_state, i_and_piece):
            (total, state), (i, piece) = total_and_state, i_and_piece
            x, (nll, count, state) = f(trained, frozen, piece, state, jax.random.fold_in(key, i))
            return (jax.tree.map(jnp.add, total, (x, nll, count)), state), None

        x, (nll, count, _) = jax.eval_shape(f, trained, frozen, jax.tree.map(lambda x: x[0], pieces), start, key)
        zeros = _zeros((x, nll, count))
        ((x, nll, count), end), _ = jax.lax.scan(one, (zeros, start), (jnp.arange(segments), pieces))
        return x, (nll, count, None if carry is None else end)

    return run


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@jax.named_scope("optimiser")
def apply_gradient(tx, state, grads, loss, lr):
    """The state after a step along `grads`, unchanged where that or the loss is not finite, and the step's metrics."""
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
