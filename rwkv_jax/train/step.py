"""The state of a run and one step of it: pure functions that every strategy runs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rwkv_jax import optim
from rwkv_jax.finetune import FULL
from rwkv_jax.models.layers import on_own_rows


class TrainState(struct.PyTreeNode):
    step: jax.Array  # steps taken, counting the skipped
    params: dict
    opt_state: tuple
    skipped: jax.Array  # steps whose loss or gradient was not finite: they changed nothing
    frozen: Any = None  # parameters that the run only starts from, beside those that it trains


def stored(state: TrainState) -> dict:
    """What a checkpoint holds of a state: neither what is frozen, nor fields that the run has no use for."""
    return {name: x for name, x in vars(state).items() if x is not None and name != "frozen"}


def make_init(model, tx, method=FULL):
    """`init(key) -> TrainState`."""

    def init(key):
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        params, frozen = method.split(model, params, key)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero, frozen)

    return init


def make_step(model, tx, **options):
    """`step(state, batch, lr, axis_name=None) -> (state, metrics)` on tokens [B, T+1] and a loss mask [B, T].

    Options are those of `make_gradient`.
    """
    mean_gradient = make_gradient(model, **options)

    def step(state, batch, lr, axis_name=None):
        return apply_gradient(tx, state, *mean_gradient(state, batch, axis_name), lr)

    return step


def make_gradient(model, *, method=FULL, accumulation=1, seed=0, l2wrap=True, loss_chunk=None):
    """`mean_gradient(state, batch, axis_name=None) -> (gradient, loss in nats)`.

    Loss and gradient are sums, divided once by the number of masked-in targets of the whole step: over micro-batches
    and devices too, so that neither changes what a ragged mask means. `loss_chunk`: see `optim.token_losses`.
    """

    def token_losses(head_params, rows):
        head = lambda x: model.apply({"params": {"head": head_params}}, x, method="logits")
        return optim.token_losses(head, *rows, loss_chunk)

    def objective(params, frozen, batch, key):
        tokens_BT, mask_BT = batch["tokens"], batch["mask"]
        rngs = {"dropout": key} if model.dropout else None
        params, initial = method.bind(params, frozen, len(tokens_BT))
        x_BTD, _ = model.apply({"params": params}, tokens_BT[:, :-1], initial, rngs=rngs, method="hidden")
        # every device gathers the head once and chunks its own rows: the head's gradient is reduced once too
        with jax.named_scope("loss"):
            nll_BT, penalty_BT = on_own_rows(token_losses)(params["head"], (x_BTD, tokens_BT[:, 1:]))
            nll_BT = jnp.where(mask_BT, nll_BT, 0)
            penalty_BT = jnp.where(mask_BT, penalty_BT, 0) if l2wrap else 0
        return (nll_BT + penalty_BT).sum(), (nll_BT.sum(), mask_BT.sum())

    def gradient(*operands):
        """Sums over micro-batches and devices are float32 at least, whatever the parameters are."""
        return optim.wide(jax.grad(objective, has_aux=True)(*operands))

    def sums(params, frozen, batch, key):
        if accumulation == 1:
            return gradient(params, frozen, batch, key)
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total, i_and_batch):
            i, batch = i_and_batch
            grads = gradient(params, frozen, batch, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, grads), None

        shapes = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro))[0]

    def mean_gradient(state, batch, axis_name=None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        totals = sums(state.params, state.frozen, batch, key)
        if axis_name is not None:
            totals = jax.lax.psum(totals, axis_name)
        grads, (nll, count) = totals
        return jax.tree.map(lambda g: g / count, grads), nll / count

    return mean_gradient


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
