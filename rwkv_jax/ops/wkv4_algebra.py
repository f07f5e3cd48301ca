"""Steps and merges of WKV states: the algebra that all forms of `ops.wkv4` and its kernels share.

Equations are those of `ops/wkv4.py`. Functions are elementwise, so arrays may have any leading axes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EMPTY = -1e38  # log_scale of "nothing seen yet": exp(EMPTY - anything) is 0, and it stays finite when decayed
FORGET = -2e38  # log decay that drops the past at a reset: below EMPTY, so that an empty past cannot survive it


class WKV4State(NamedTuple):
    """The past of every channel: a = num * exp(log_scale), b = den * exp(log_scale), each [B, D].

    (num, den, log_scale) and (num e^-c, den e^-c, log_scale + c) are the same state. Gradients are those with
    respect to a and b: a returned log_scale is a constant, num and den carry the whole cotangent. This is exact
    where the state is only fed back into `wkv4`. The gradient of the empty state is zero.
    """

    num: jax.Array
    den: jax.Array
    log_scale: jax.Array

    @classmethod
    def empty(cls, batch: int, dim: int, dtype=jnp.float32) -> "WKV4State":
        # an array for each leaf, so that a state can be donated
        zeros = lambda: jnp.zeros((batch, dim), dtype)
        return cls(zeros(), zeros(), jnp.full((batch, dim), EMPTY, dtype))


def read_token(u, k, v, state):
    """(y, denominator, weight of the past in it, weight of the current token): the larger weight is 1."""
    d = (state.log_scale - k) - u
    smaller = jnp.exp(-jnp.abs(d))
    past, now = jnp.where(d > 0, 1, smaller), jnp.where(d > 0, smaller, 1)
    den = past * state.den + now
    return (past * state.num + now * v) / den, den, past, now


def write_token(w, k, v, state):
    """(the state after a token, weight of the past in it, weight of the token).

    log_scale is rounded. Computed in this order, (log_scale - q) + w recovers what the rounding lost;
    log_scale + w - q would lose a small decay beside a large exponent at every step.
    """
    q = jnp.maximum(state.log_scale + w, k)
    past, now = jnp.exp((state.log_scale - q) + w), jnp.exp(k - q)
    return WKV4State(past * state.num + now * v, past * state.den + now, q), past, now


def token_grads(u, k, v, dy, before, past, now, after):
    """(dw, du, dk, dv) of one token, and the cotangent (num, den) of the state before it.

    `before` is the state that the token read, `past` and `now` are the weights by which it wrote the next one, whose
    cotangent (num, den) is `after`. Both cotangents are those of num and den as stored, at the scale of their state,
    so they cannot overflow (see `ops/wkv4.py`).
    """
    G, H = after
    y, den, past_read, now_read = read_token(u, k, v, before)
    g = dy / den
    du = now_read * g * (v - y)
    dv = now_read * g + now * G
    dk = du + now * (G * v + H)
    dw = past * (before.num * G + before.den * H)
    g = past_read * g
    return (dw, du, dk, dv), (past * G + g, past * H - g * y)


def merge_states(w, earlier, later):
    """State `earlier` decayed by w, plus `later`."""
    q = lax.stop_gradient(jnp.maximum(earlier.log_scale + w, later.log_scale))  # constant, see `WKV4State`
    e1, e2 = jnp.exp((earlier.log_scale - q) + w), jnp.exp(later.log_scale - q)
    return WKV4State(e1 * earlier.num + e2 * later.num, e1 * earlier.den + e2 * later.den, q)


def choose_states(mask, a, b):
    """Choose whole states by a boolean mask without a channel axis; None chooses b."""
    return b if mask is None else jax.tree.map(lambda x, y: jnp.where(mask[..., None], x, y), a, b)
