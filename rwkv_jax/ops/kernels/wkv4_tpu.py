"""WKV of RWKV-4 as Pallas kernels for TPU: forward, and backward with the states recomputed.

One program handles one row of the batch and `BLOCK_D` channels, and goes through time in blocks of `BLOCK_T` tokens,
each fetched while the previous one is computed; the state, or in the backward pass its cotangent, stays in float32
scratch between them. A vector register holds 8 tokens of 128 channels, so tokens are processed eight at a time: all
prefixes of the eight in three rounds of merging, then the carry merged into each. One token at a time would leave
seven of eight sublanes idle.

States are passed as one array [..., 3, D] of (num, den, log_scale), cotangents as [..., 2, D] of (num, den). The
forward pass keeps the state at the start of each block, 12 bytes a channel for every `BLOCK_T` tokens; the backward
pass recomputes the states in between.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rwkv_jax.ops.wkv4_algebra import EMPTY, FORGET, WKV4State, merge_states, read_token, token_grads

ROWS = 8  # sublanes of a register
BLOCK_T = 256
BLOCK_D = 256

PADDING, TOKEN, DOCUMENT = 0, 1, 2  # kinds of token in `kind_BT1`: masked, ordinary, first of a document


def forward(w_1D, u_1D, k_BTD, v_BTD, state, reset_BT, valid_BT, interpret=False):
    """(y [B, T, D] in the dtype of v, final `WKV4State`, states [B, M, 3, D] at the start of each block)."""
    (B, T, D), dtype = k_BTD.shape, state.num.dtype
    w_1D, u_1D, k_BTD, v_BTD, kind_BT1 = _padded(w_1D, u_1D, k_BTD, v_BTD, reset_BT, valid_BT)
    state_B3D = _lanes(jnp.stack(state, axis=1))
    blocks = _Blocks(k_BTD, reverse=False)
    y_BTD, final_B3D, starts_BM3D = pl.pallas_call(
        partial(_forward_kernel, masked=kind_BT1 is not None),
        grid=blocks.grid,
        in_specs=[*[blocks.vector] * 2, *[blocks.tokens] * 2, blocks.state, *[blocks.kind] * (kind_BT1 is not None)],
        out_specs=[blocks.tokens, blocks.state, blocks.starts],
        out_shape=[
            jax.ShapeDtypeStruct(v_BTD.shape, v_BTD.dtype),
            jax.ShapeDtypeStruct(state_B3D.shape, dtype),
            jax.ShapeDtypeStruct((B, blocks.grid[2], *state_B3D.shape[1:]), dtype),
        ],
        scratch_shapes=[pltpu.VMEM((3, blocks.size_d), dtype)],
        compiler_params=_COMPILER,
        interpret=interpret,
    )(w_1D, u_1D, k_BTD, v_BTD, state_B3D, *_given(kind_BT1))
    final = WKV4State(*(final_B3D[:, i, :D] for i in range(3)))
    return y_BTD[:, :T, :D], final, starts_BM3D


def backward(w_1D, u_1D, k_BTD, v_BTD, starts_BM3D, reset_BT, valid_BT, dy_BTD, dfinal, interpret=False):
    """(dw, du [B, D], dk, dv [B, T, D], cotangent (num, den) of the incoming state), from that of the final one."""
    (B, T, D), dtype = k_BTD.shape, dfinal[0].dtype
    w_1D, u_1D, k_BTD, v_BTD, kind_BT1 = _padded(w_1D, u_1D, k_BTD, v_BTD, reset_BT, valid_BT)
    dy_BTD = _lanes(_to(dy_BTD, k_BTD.shape[1]))
    dfinal_B2D = _lanes(jnp.stack(dfinal, axis=1))
    blocks = _Blocks(k_BTD, reverse=True)
    sums = jax.ShapeDtypeStruct((B, 1, k_BTD.shape[2]), dtype)
    dw_B1D, du_B1D, dk_BTD, dv_BTD, d_B2D = pl.pallas_call(
        partial(_backward_kernel, masked=kind_BT1 is not None),
        grid=blocks.grid,
        in_specs=[
            *[blocks.vector] * 2,
            *[blocks.tokens] * 2,
            blocks.starts,
            blocks.tokens,
            blocks.cotangent,
            *[blocks.kind] * (kind_BT1 is not None),
        ],
        out_specs=[*[blocks.sums] * 2, *[blocks.tokens] * 2, blocks.cotangent],
        out_shape=[
            sums,
            sums,
            jax.ShapeDtypeStruct(k_BTD.shape, k_BTD.dtype),
            jax.ShapeDtypeStruct(v_BTD.shape, v_BTD.dtype),
            jax.ShapeDtypeStruct(dfinal_B2D.shape, dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, blocks.size_d), dtype),
            pltpu.VMEM((2, ROWS, blocks.size_d), dtype),
            pltpu.VMEM((4, blocks.size_t, blocks.size_d), dtype),
        ],
        compiler_params=_COMPILER,
        interpret=interpret,
    )(w_1D, u_1D, k_BTD, v_BTD, starts_BM3D, dy_BTD, dfinal_B2D, *_given(kind_BT1))
    d = (d_B2D[:, 0, :D], d_B2D[:, 1, :D])
    return dw_B1D[:, 0, :D], du_B1D[:, 0, :D], dk_BTD[:, :T, :D], dv_BTD[:, :T, :D], d


_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


class _Blocks:
    """Grid (row, block of channels, block of time), and the block of every kind of array that each program sees."""

    def __init__(self, k_BTD, reverse):
        B, T, D = k_BTD.shape
        self.size_t = min(BLOCK_T, T)
        self.size_d = next(size for size in (BLOCK_D, 128) if D % size == 0)
        M = T // self.size_t
        self.grid = (B, D // self.size_d, M)
        m = (lambda t: M - 1 - t) if reverse else (lambda t: t)
        self.tokens = pl.BlockSpec((1, self.size_t, self.size_d), lambda b, d, t: (b, m(t), d))
        self.kind = pl.BlockSpec((1, self.size_t, 1), lambda b, d, t: (b, m(t), 0))
        self.starts = pl.BlockSpec((1, 1, 3, self.size_d), lambda b, d, t: (b, m(t), 0, d))
        self.state = pl.BlockSpec((1, 3, self.size_d), lambda b, d, t: (b, 0, d))
        self.cotangent = pl.BlockSpec((1, 2, self.size_d), lambda b, d, t: (b, 0, d))
        self.sums = pl.BlockSpec((1, 1, self.size_d), lambda b, d, t: (b, 0, d))
        self.vector = pl.BlockSpec((1, self.size_d), lambda b, d, t: (0, d))


def _padded(w_1D, u_1D, k_BTD, v_BTD, reset_BT, valid_BT):
    """Operands padded to whole registers and blocks, and the kind of each token, None where all are ordinary."""
    B, T, _ = k_BTD.shape
    whole = -(-T // BLOCK_T) * BLOCK_T if T > BLOCK_T else -(-T // 16) * 16  # 16 rows of bfloat16 share a tile
    kind_BT1 = None
    if whole > T or reset_BT is not None or valid_BT is not None:
        kind_BT = jnp.full((B, T), TOKEN) if reset_BT is None else jnp.where(reset_BT, DOCUMENT, TOKEN)
        kind_BT = kind_BT if valid_BT is None else jnp.where(valid_BT, kind_BT, PADDING)
        kind_BT1 = jnp.pad(kind_BT, ((0, 0), (0, whole - T)))[..., None].astype(jnp.int32)
    k_BTD, v_BTD = (_lanes(_to(x, whole)) for x in (k_BTD, v_BTD))
    return _lanes(jnp.maximum(w_1D, FORGET)), _lanes(u_1D), k_BTD, v_BTD, kind_BT1


def _to(x_BTD, T):
    return jnp.pad(x_BTD, ((0, 0), (0, T - x_BTD.shape[1]), (0, 0)))


def _lanes(x):
    """Channels zero-padded to a multiple of 128; callers cut the padding off."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 128)])


def _given(x):
    return () if x is None else (x,)


# ------------------------------------------------------------------------------------ inside a program


def _prefixes(decay, states, carry):
    """Merges, for eight rows, of `carry` and the states up to each row, each state decayed by the rows after it.
    `decay` [8, D] is each row's log decay of the states before it."""
    row = jax.lax.broadcasted_iota(jnp.int32, decay.shape, 0)
    for distance in (1, 2, 4):
        earlier = jax.tree.map(lambda x, by=distance: pltpu.roll(x, by, 0), (decay, states))
        earlier = _choose(row >= distance, earlier, (jnp.zeros_like(decay), _empty(states)))
        states = merge_states(decay, earlier[1], states)
        decay = jnp.maximum(decay + earlier[0], FORGET)
    return merge_states(decay, carry, states)


def _suffixes(factor, terms, carry):
    """(c[r], c[r + 1]) for eight rows, with c[r] = factor[r] c[r + 1] + term[r] and c[8] = `carry`."""
    row = jax.lax.broadcasted_iota(jnp.int32, factor.shape, 0)
    later = lambda x, distance: pltpu.roll(x, ROWS - distance, 0)
    for distance in (1, 2, 4):
        inside = row < ROWS - distance
        terms = [x + jnp.where(inside, factor * later(x, distance), 0) for x in terms]
        factor = jnp.where(inside, factor * later(factor, distance), factor)
    c = [factor * x_carry + x for x, x_carry in zip(terms, carry, strict=True)]
    after = [jnp.where(row == ROWS - 1, x_carry, later(x, 1)) for x, x_carry in zip(c, carry, strict=True)]
    return c, after


def _choose(mask, a, b):
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), a, b)


def _empty(states):
    return WKV4State(*(jnp.full_like(x, fill) for x, fill in zip(states, (0, 0, EMPTY), strict=True)))


def _group(w, kind_ref, rows, shape):
    """(decay [8, D] by each row, masks [8, 1] of documents' first tokens and of valid tokens, None without masks)."""
    if kind_ref is None:
        return jnp.broadcast_to(w, shape), None, None
    kind = kind_ref[0, rows, :]
    decay = jnp.where(kind == PADDING, 0.0, jnp.where(kind == DOCUMENT, FORGET, w))
    return decay.astype(w.dtype), kind == DOCUMENT, kind != PADDING


def _states(decay, k, v, reset, valid, carry):
    """(the state that each of eight tokens reads, the state after each)."""
    states = WKV4State(v, jnp.ones_like(v), k)
    states = states if valid is None else _choose(valid, states, _empty(states))
    after = _prefixes(decay, states, carry)
    first = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) == 0
    before = _choose(first, carry, jax.tree.map(lambda x: pltpu.roll(x, 1, 0), after))
    before = before if reset is None else _choose(reset, _empty(before), before)
    return before, after


def _last(states):
    return jax.tree.map(lambda x: x[ROWS - 1 :], states)


def _rows(ref):
    return [ref[i : i + 1, :] for i in range(ref.shape[0])]


def _store(ref, rows):
    for i, x in enumerate(rows):
        ref[i : i + 1, :] = x


def _forward_kernel(w_ref, u_ref, k_ref, v_ref, state_ref, *refs, masked):
    kind_ref, (y_ref, final_ref, starts_ref, carry_ref) = (refs[0], refs[1:]) if masked else (None, refs)
    dtype, w, u = carry_ref.dtype, w_ref[...], u_ref[...]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = state_ref[0]

    starts_ref[0, 0] = carry_ref[...]

    def eight(i, carry):
        rows = pl.ds(i * ROWS, ROWS)
        k, v = k_ref[0, rows, :].astype(dtype), v_ref[0, rows, :].astype(dtype)
        decay, reset, valid = _group(w, kind_ref, rows, k.shape)
        before, after = _states(decay, k, v, reset, valid, carry)
        y_ref[0, rows, :] = read_token(u, k, v, before)[0].astype(y_ref.dtype)
        return _last(after)

    carry = jax.lax.fori_loop(0, k_ref.shape[1] // ROWS, eight, WKV4State(*_rows(carry_ref)))
    _store(carry_ref, carry)
    final_ref[0] = carry_ref[...]


def _backward_kernel(w_ref, u_ref, k_ref, v_ref, starts_ref, dy_ref, dfinal_ref, *refs, masked):
    kind_ref, refs = (refs[0], refs[1:]) if masked else (None, refs)
    dw_ref, du_ref, dk_ref, dv_ref, d_ref, carry_ref, sums_ref, states_ref = refs
    dtype, w, u = carry_ref.dtype, w_ref[...], u_ref[...]
    groups = k_ref.shape[1] // ROWS

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = dfinal_ref[0]
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def recompute(i, carry):
        rows = pl.ds(i * ROWS, ROWS)
        k, v = k_ref[0, rows, :].astype(dtype), v_ref[0, rows, :].astype(dtype)
        decay, reset, valid = _group(w, kind_ref, rows, k.shape)
        before, after = _states(decay, k, v, reset, valid, carry)
        for j, x in enumerate((*before, after.log_scale)):
            states_ref[j, rows, :] = x
        return _last(after)

    jax.lax.fori_loop(0, groups, recompute, WKV4State(*_rows(starts_ref.at[0, 0])))

    def eight(i, carry_and_sums):
        carry, dw, du = carry_and_sums
        rows = pl.ds((groups - 1 - i) * ROWS, ROWS)
        k, v, dy = (ref[0, rows, :].astype(dtype) for ref in (k_ref, v_ref, dy_ref))
        _, reset, valid = _group(w, kind_ref, rows, k.shape)
        *before, after_scale = (states_ref[j, rows, :] for j in range(4))
        before = WKV4State(*before)
        # merging padding leaves the value of a state as it is, but may change its log_scale
        decay = w if valid is None else jnp.where(valid, w, 0.0)
        past, now = jnp.exp((before.log_scale - after_scale) + decay), jnp.exp(k - after_scale)
        now = now if valid is None else jnp.where(valid, now, 0.0)
        zeros = jnp.zeros_like(k)
        _, reads = token_grads(u, k, v, dy, before, past, now, (zeros, zeros))
        factor, reads = (past, reads) if reset is None else _choose(reset, (zeros, (zeros, zeros)), (past, reads))
        cotangents, after = _suffixes(factor, reads, carry)
        (dw_t, du_t, dk, dv), _ = token_grads(u, k, v, dy, before, past, now, after)
        dk_ref[0, rows, :], dv_ref[0, rows, :] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
        dw_t = dw_t if valid is None else jnp.where(valid, dw_t, 0.0)
        return [x[:1] for x in cotangents], dw + dw_t, du + du_t

    carry, dw, du = jax.lax.fori_loop(0, groups, eight, (_rows(carry_ref), sums_ref[0], sums_ref[1]))
    _store(carry_ref, carry)
    sums_ref[0], sums_ref[1] = dw, du
    d_ref[0] = carry_ref[...]
    dw_ref[0] = jnp.sum(dw, axis=0, keepdims=True)
    du_ref[0] = jnp.sum(du, axis=0, keepdims=True)
