"""The recurrent state after B texts, as a value: keep it, fork it, select rows of it, save it.

An RWKV context has constant size, whatever the length of the texts. Attention keeps caches with a slot for each token,
the leaves that depend on `max_length` of `model.init_state`; they grow when a longer text is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

CACHE_STEP = 256  # caches are multiples of this, so that they share compiled functions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """The state after B texts, leaves [B, ...], and the logits [B, V] of the token that follows each.

    Functions of this package do not change the context that they are given. To fork a text, use its context twice.
    """

    state: tuple
    logits_BV: jax.Array


def rows(context: Context, index) -> Context:
    """Select texts by an int, a slice or a list: `rows(context, [0, 0, 2])` holds the first one twice."""
    B = len(context.logits_BV)
    return _taken(context, np.atleast_1d(np.arange(B)[index]))  # NumPy raises IndexError out of range, JAX clamps


@jax.jit
def _taken(context, index_N):
    return jax.tree.map(lambda x: x[index_N], context)


def concatenate(contexts: Sequence[Context]) -> Context:
    """Join contexts of one model into one that holds all their texts. Caches become as long as the longest."""
    if not contexts:
        raise ValueError("no contexts, expected at least one")
    if len({jax.tree.structure(context) for context in contexts}) > 1:
        raise ValueError("the contexts are those of different models, expected one model's")
    return _joined(tuple(contexts))


@jax.jit
def _joined(contexts):
    def joined(*leaves):
        sizes = np.max([x.shape[1:] for x in leaves], axis=0).tolist()
        return jnp.concatenate([_filled_up(x, (len(x), *sizes)) for x in leaves])

    return jax.tree.map(joined, *contexts)


def begin(model, context: Context | None, batch: int, room: int) -> Context:
    """Return a context that may be donated: empty, or a copy of the given one, with room in caches for `room` tokens.

    Raises:
        ValueError: the given one is another model's, or of another number of texts.
    """
    if context is None:
        return _empty(model, batch, _round_up(max(room, 1)) if any(cache_axes(model)) else None)
    check(model, context, batch)
    return _copied(model, context, _slots(model, context, room, room))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(model, batch, slots):
    logits_BV = jnp.zeros((batch, model.vocab_size), jnp.promote_types(model.dtype, jnp.float32))
    return Context(model.init_state(batch, max_length=slots), logits_BV)


@partial(jax.jit, static_argnums=(0, 2))
def _copied(model, context, slots):
    """Return a copy with caches of `slots` tokens; None: of the length they have."""
    state = context.state
    if slots is not None:
        wanted = jax.eval_shape(lambda: model.init_state(len(context.logits_BV), max_length=slots))
        state = jax.tree.map(lambda x, shape: _filled_up(x, shape.shape), state, wanted)
    return jax.tree.map(jnp.copy, Context(state, context.logits_BV))


def check(model, context: Context, batch: int) -> None:
    """Raise ValueError unless the context is one of this model with `batch` texts; its caches may have any length."""
    if context.logits_BV.ndim != 2:
        raise ValueError(f"the context has logits {context.logits_BV.shape}, expected [B, V]")
    B, V = context.logits_BV.shape
    wanted = jax.eval_shape(lambda: model.init_state(B, max_length=CACHE_STEP))
    good = model.vocab_size == V and jax.tree.structure(wanted) == jax.tree.structure(context.state)
    if good:
        sizes = lambda x, grows: [n for axis, n in enumerate(x.shape) if axis not in grows]
        leaves = zip(jax.tree.leaves(context.state), jax.tree.leaves(wanted), cache_axes(model), strict=True)
        good = all(
            x.dtype == y.dtype and x.ndim == y.ndim and sizes(x, grows) == sizes(y, grows) for x, y, grows in leaves
        )
    if not good:
        raise ValueError("the context is not one of this model: its arrays have other names, shapes or dtypes")
    if batch != B:
        raise ValueError(f"the context holds {B} texts, expected one for each of the {batch} prompts")


@lru_cache(maxsize=16)  # called before every token of a stream
def cache_axes(model) -> list[tuple[int, ...]]:
    """Return the axes that grow with `max_length`, for each leaf of a state: none but in caches."""
    few, many = (jax.tree.leaves(jax.eval_shape(lambda n=n: model.init_state(1, max_length=n))) for n in (1, 2))
    differ = lambda x, y: tuple(axis for axis, (n, m) in enumerate(zip(x.shape, y.shape, strict=True)) if n != m)
    return [differ(x, y) for x, y in zip(few, many, strict=True)]


def with_room(model, context: Context, room: int, likely: int) -> Context:
    """Return the context with caches for at least `room` more tokens.

    Caches that must grow double, up to room for `likely` tokens: few shapes to compile, few copies.
    """
    slots = _slots(model, context, room, likely)
    return context if slots is None else _copied(model, context, slots)


def _slots(model, context, room, likely) -> int | None:
    """Return the length to which caches must grow for `room` more tokens; None if they suffice or there are none."""
    axes = cache_axes(model)
    if not any(axes):
        return None
    leaves = jax.tree.leaves(context.state)
    slots = next(x.shape[grows[0]] for x, grows in zip(leaves, axes, strict=True) if grows)
    entries = zip(model.every_layer, context.state, strict=True)
    length = max(int(np.asarray(kind.cached(entry)[1]).max()) for (_, kind, _), entry in entries if kind.cached)
    if length + room <= slots:
        return None
    return _round_up(max(length + room, min(2 * slots, length + likely)))


def _round_up(length: int) -> int:
    return -(-length // CACHE_STEP) * CACHE_STEP


def _filled_up(x, shape):
    """Return x, padded with zeros at the end to `shape`."""
    return jnp.pad(x, [(0, wanted - size) for size, wanted in zip(x.shape, shape, strict=True)])
