"""WKV of RWKV-4 in blocks: all chunks of time scanned side by side, as rows of a batch.

What a chunk does to its past is one decay and one addition. So every chunk is read from an empty past, the chain of
what they leave gives each its true past, and all are read again from there; backward in time likewise. Twice the work
of a scan in T / C + C steps instead of T, each of M times as many numbers: on 2 CPU cores 1.5 times as fast as the
scan at B·D 128, as fast at 256, slower from 512 on (T 1,024, 2026-11-24). Not measured on a GPU.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.ops.wkv4 import FORGET, WKV4State, merge, padded, scan_backward, scan_forward


def fade(w, T, reset_BT, valid_BT):
    """Log factor [B, D], or [1, D] without masks, by which T tokens fade what comes before them."""
    steps_B1 = jnp.full((1, 1), T, w.dtype) if valid_BT is None else valid_BT.sum(1, keepdims=True, dtype=w.dtype)
    # no tokens at all fade nothing, not even by -inf
    faded = jnp.where(steps_B1 == 0, 0, jnp.maximum(steps_B1 * jnp.maximum(w, FORGET), FORGET))
    if reset_BT is None:
        return faded
    reset_BT = reset_BT if valid_BT is None else reset_BT & valid_BT
    return jnp.where(reset_BT.any(1, keepdims=True), FORGET, faded)


def chain(fades_MBD, parts_MBD, state, reverse=False):
    """The state after all parts, and the one before each [M, B, D]; a part is what it leaves of an empty past."""
    follow = lambda state, part: (merge(part[0], state, part[1]), state)
    return lax.scan(follow, state, (fades_MBD, parts_MBD), reverse=reverse)


def _blocks(w, k_BTD, v_BTD, reset_BT, valid_BT):
    """Inputs as rows [B·M, C, ...] of one chunk each, and the fade [M, B, D] of each chunk."""
    B, _, D = k_BTD.shape
    chunk, *arrays = padded(k_BTD, v_BTD, reset_BT, valid_BT)
    k, v, reset, valid = (None if x is None else x.reshape(-1, chunk, *x.shape[2:]) for x in arrays)
    fades = jnp.broadcast_to(fade(w, chunk, reset, valid), (len(k), D))
    return k, v, reset, valid, _by_block(fades, B)


def _by_block(rows, B):
    """[B·M, ...] as [M, B, ...]."""
    return jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[1:]).swapaxes(0, 1), rows)


def _by_row(blocks):
    """[M, B, ...] as [B·M, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), blocks)


def forward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    """(y, final state, states [M, B, D] at the start of each chunk), as `wkv4.scan_forward` returns them."""
    B, T, D = k_BTD.shape
    k, v, reset, valid, fades = _blocks(w, k_BTD, v_BTD, reset_BT, valid_BT)
    _, parts, _ = scan_forward(w, u, k, v, WKV4State.empty(len(k), D, state.num.dtype), reset, valid)
    final, starts = chain(fades, _by_block(parts, B), state)
    y, _, _ = scan_forward(w, u, k, v, _by_row(starts), reset, valid)
    return y.reshape(B, -1, D)[:, :T], final, starts


def backward(w, u, k_BTD, v_BTD, starts_MBD, reset_BT, valid_BT, dy_BTD, dstate):
    """(dw, du [B, D], dk, dv [B, T, D], cotangent of the incoming state), as `wkv4.scan_backward` returns them."""
    B, T, D = k_BTD.shape
    k, v, reset, valid, fades = _blocks(w, k_BTD, v_BTD, reset_BT, valid_BT)
    extra = k.shape[0] * k.shape[1] // B - T
    dy = jnp.pad(dy_BTD, ((0, 0), (0, extra), (0, 0))).reshape(k.shape)
    starts = jax.tree.map(lambda x: x[None], _by_row(starts_MBD))  # one chunk in each row
    backward = lambda after: scan_backward(w, u, k, v, starts, reset, valid, dy, after)
    *_, parts = backward(WKV4State.empty(len(k), D, dstate.num.dtype))
    dstate, after = chain(fades, _by_block(parts, B), dstate, reverse=True)
    dw, du, dk, dv, _ = backward(_by_row(after))
    over_chunks = lambda x: x.reshape(B, -1, D).sum(1)
    return over_chunks(dw), over_chunks(du), *(x.reshape(B, -1, D)[:, :T] for x in (dk, dv)), dstate
