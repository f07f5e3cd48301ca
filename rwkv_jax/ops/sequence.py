"""One long sequence of RWKV-4 split along time: device i of an axis holds the i-th part of every row.

Call these inside `jax.shard_map(..., check_vma=False)`, with T the length of a device's own part:

    last_BD, _ = last_before(x_BTD, axis_name="time")                   # for `models.layers.token_shift`
    y_BTD, state = wkv4_sequence(w_D, u_D, k_BTD, v_BTD, axis_name="time")

A part changes the state before it by one decay, T·w, and one addition, (num, den, log_scale): four numbers a channel,
exchanged once, whatever the length.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.ops.wkv4 import wkv4
from rwkv_jax.ops.wkv4_algebra import FORGET, WKV4State, merge_states


def wkv4_sequence(w_D, u_D, k_BTD, v_BTD, state=None, *, axis_name, reset_BT=None, valid_BT=None, impl=None):
    """`wkv4` over all parts: y_BTD of this device's part, and the `WKV4State` after the last part.

    Every device runs its part from an empty past, gathers the effects of all parts, and runs again from the state
    before its own. `state` precedes the first part; like the returned one it is the same on all devices. Other
    arguments are those of `wkv4`.
    """
    B, T, D = k_BTD.shape
    masks = {"reset_BT": reset_BT, "valid_BT": valid_BT}
    _, part = wkv4(w_D, u_D, k_BTD, v_BTD, **masks, impl=impl)
    dtype = part.num.dtype
    state = WKV4State.empty(B, D, dtype) if state is None else jax.tree.map(lambda x: x.astype(dtype), state)
    parts = lax.all_gather((_fade(w_D.astype(dtype)[None], T, **masks), part), axis_name)

    final, before = lax.scan(lambda past, part: (merge_states(part[0], past, part[1]), past), state, parts)
    own = jax.tree.map(lambda x: x[lax.axis_index(axis_name)], before)
    return wkv4(w_D, u_D, k_BTD, v_BTD, own, **masks, impl=impl)[0], final


def _fade(w, T, reset_BT, valid_BT):
    """Log factor [B, D], or [1, D] without masks, by which T tokens decay the state before them."""
    steps_B1 = jnp.full((1, 1), T, w.dtype) if valid_BT is None else valid_BT.sum(1, keepdims=True, dtype=w.dtype)
    # zero tokens decay nothing, not even by -inf
    faded = jnp.where(steps_B1 == 0, 0, jnp.maximum(steps_B1 * jnp.maximum(w, FORGET), FORGET))
    if reset_BT is None:
        return faded
    reset_BT = reset_BT if valid_BT is None else reset_BT & valid_BT
    return jnp.where(reset_BT.any(1, keepdims=True), FORGET, faded)


def last_before(x_BTD, last_BD=None, *, axis_name, valid_BT=None):
    """Activations [B, D] of the last token before this device's part, and of the last one of all; padding is skipped.

    `last_BD` precedes the first part; None is zero, as at the start of a text.
    """
    B, T, D = x_BTD.shape
    last_BD = jnp.zeros((B, D), x_BTD.dtype) if last_BD is None else last_BD.astype(x_BTD.dtype)
    valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
    newest_B = jnp.max(jnp.where(valid_BT, jnp.arange(T)[None], 0), axis=1)
    own_BD = jnp.take_along_axis(x_BTD, newest_B[:, None, None], axis=1)[:, 0]
    parts = lax.all_gather((own_BD, valid_BT.any(1, keepdims=True)), axis_name)

    def follow(last_BD, part):
        return jnp.where(part[1], part[0], last_BD), last_BD

    final_BD, before = lax.scan(follow, last_BD, parts)
    return before[lax.axis_index(axis_name)], final_BD
