"""WKV of RWKV-4 as Mosaic GPU kernels for NVIDIA GPUs (Hopper and later): forward, and backward with the states
recomputed.

One warpgroup handles one row of the batch and `BLOCK_D` channels, a thread each, with the state, or in the backward
pass its cotangent, in registers. It goes through time in blocks of `BLOCK_T` tokens, fetched into shared memory
`STAGES` ahead by the copy engine. The loop over the tokens of a block is unrolled: only the few instructions that
carry the state wait for the previous token, and there are too few warps to hide the latency of the rest. For the same
reason the states that the backward pass recomputes stay in registers, and exponentials and reciprocals are the
hardware's approximations (about 2 units in the last place).

The forward pass keeps the state (num, den, log_scale) at the start of each block, 12 bytes a channel for every
`BLOCK_T` tokens. Everything is computed in float32. `interpret` runs the kernels on a CPU (jax 0.11 and later).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rwkv_jax.ops.wkv4_algebra import EMPTY, FORGET, WKV4State

BLOCK_T = 16
BLOCK_D = 128  # threads of a warpgroup
STAGES = 4


# Lowering takes seconds: under jit the layers of a model share it.
@partial(jax.jit, static_argnames="interpret")
def forward(w_1D, u_1D, k_BTD, v_BTD, state, reset_BT, valid_BT, interpret=False):
    """(y [B, T, D] in the dtype of v, final `WKV4State`, states [B, M, 3, D] at the start of each block)."""
    B, T, D = k_BTD.shape
    masks, w_D, u_D, k_BTD, v_BTD = _whole_blocks(w_1D, u_1D, k_BTD, v_BTD, reset_BT, valid_BT)
    _, whole_T, whole_D = k_BTD.shape
    array = jax.ShapeDtypeStruct
    outputs = [
        array(v_BTD.shape, v_BTD.dtype),
        *[array((B, whole_D), jnp.float32)] * 3,
        array((B, whole_T // BLOCK_T, 3, whole_D), jnp.float32),
    ]
    kernel = _kernel(_forward_kernel, "wkv4_forward", outputs, interpret)
    y_BTD, *final, starts_BM3D = kernel(*masks, w_D, u_D, k_BTD, v_BTD, *(_lanes(x) for x in state))
    return y_BTD[:, :T, :D], WKV4State(*(x[:, :D] for x in final)), starts_BM3D


@partial(jax.jit, static_argnames="interpret")
def backward(w_1D, u_1D, k_BTD, v_BTD, starts_BM3D, reset_BT, valid_BT, dy_BTD, dfinal, interpret=False):
    """(dw, du [B, D], dk, dv [B, T, D], cotangent (num, den) of the incoming state), from that of the final one."""
    B, T, D = k_BTD.shape
    masks, w_D, u_D, k_BTD, v_BTD = _whole_blocks(w_1D, u_1D, k_BTD, v_BTD, reset_BT, valid_BT)
    _, whole_T, whole_D = k_BTD.shape
    array = jax.ShapeDtypeStruct
    outputs = [
        *[array((B, whole_D), jnp.float32)] * 4,
        array(k_BTD.shape, k_BTD.dtype),
        array(v_BTD.shape, v_BTD.dtype),
    ]
    kernel = _kernel(_backward_kernel, "wkv4_backward", outputs, interpret)
    *sums, dk_BTD, dv_BTD = kernel(
        *masks, w_D, u_D, k_BTD, v_BTD, starts_BM3D, _lanes(_to(dy_BTD, whole_T)), *(_lanes(x) for x in dfinal)
    )
    dw_BD, du_BD, dnum_BD, dden_BD = (x[:, :D] for x in sums)
    return dw_BD, du_BD, dk_BTD[:, :T, :D], dv_BTD[:, :T, :D], (dnum_BD, dden_BD)


def _kernel(body, name, outputs, interpret):
    B, whole_D = next(x.shape for x in outputs if x.ndim == 2)
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=(B, whole_D // BLOCK_D),
        grid_names=("row", "channels"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Barriers around every store would serialise the tokens. None is needed: a thread's stores go to global
            # memory, which no thread reads, and `commit_smem` ends the reading of a block before the next is fetched.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _whole_blocks(w_1D, u_1D, k_BTD, v_BTD, reset_BT, valid_BT):
    """(masks, w, u, k, v) rounded up to whole blocks. Masks is () or one array [B, M, 2 BLOCK_T]: for each token of a
    block whether it starts a document, then for each whether it is valid."""
    B, T, _ = k_BTD.shape
    whole_T = -(-T // BLOCK_T) * BLOCK_T
    masks = ()
    if whole_T > T or reset_BT is not None or valid_BT is not None:
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT & valid_BT
        pair = [jnp.pad(x, ((0, 0), (0, whole_T - T))).reshape(B, -1, BLOCK_T) for x in (reset_BT, valid_BT)]
        masks = (jnp.concatenate(pair, axis=2).astype(jnp.int32),)
    k_BTD, v_BTD = (_lanes(_to(x, whole_T)) for x in (k_BTD, v_BTD))
    return masks, _lanes(jnp.maximum(w_1D[0], FORGET)), _lanes(u_1D[0]), k_BTD, v_BTD


def _to(x_BTD, T):
    return jnp.pad(x_BTD, ((0, 0), (0, T - x_BTD.shape[1]), (0, 0)))


def _lanes(x):
    """Channels zero-padded to whole warpgroups; callers cut the padding off."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK_D)])


# ------------------------------------------------------------------------------------ inside a program
# Values are vectors [BLOCK_D], a state is (num, den, log_scale), and `masks` is [] or [one reference].


def _place():
    """(row of the batch, block of channels, the channels of that block)."""
    d = jax.lax.axis_index("channels")
    return jax.lax.axis_index("row"), d, pl.ds(d * BLOCK_D, BLOCK_D)


def _over_blocks(block, masks, tokens, starts, b, d, init, reverse=False):
    """Fold `block(m, *references to block m in shared memory, carry)` over all blocks of time, from `init`."""
    M = tokens[0].shape[1] // BLOCK_T
    at = (lambda m: M - 1 - m) if reverse else (lambda m: m)

    def step(indices, *refs):
        carry = block(at(indices[0]), *refs)
        plgpu.commit_smem()
        return carry

    return plgpu.emit_pipeline(
        step,
        grid=(M,),
        in_specs=[
            *[plgpu.BlockSpec((None, 2 * BLOCK_T), lambda m: (at(m), 0))] * len(masks),
            *[plgpu.BlockSpec((BLOCK_T, BLOCK_D), lambda m: (at(m), d))] * len(tokens),
            *[plgpu.BlockSpec((None, 3, BLOCK_D), lambda m: (at(m), 0, d))] * len(starts),
        ],
        max_concurrent_steps=STAGES,
        init_carry=init,
    )(*(ref.at[b] for ref in (*masks, *tokens, *starts)))


def _token(masks, t, state):
    """(the state that token t of a block reads, whether the token is valid or None without masks)."""
    if not masks:
        return state, None
    first, valid = (jnp.broadcast_to(masks[0][i] != 0, state[0].shape) for i in (t, BLOCK_T + t))
    empty = (0.0, 0.0, EMPTY)
    return tuple(_where(first, jnp.full_like(x, fill), x) for x, fill in zip(state, empty, strict=True)), valid


def _where(mask, a, b):
    return a if mask is None else jnp.where(mask, a, b)


def _read(u, k, v, state):
    """(y, 1 / denominator, weights of the past and of the token in it)."""
    num, den, p = state
    d = (p - k) - u
    less, one = jnp.exp(-jnp.abs(d)), jnp.ones_like(d)
    past, now = jnp.where(d < 0, less, one), jnp.where(d < 0, one, less)
    inverse = _inverse(past * den + now)
    return (past * num + now * v) * inverse, inverse, past, now


def _inverse(x):
    """1 / x for x > 0. A float32 division is ten instructions; the square of rsqrt and a step of Newton's are five."""
    r = jax.lax.rsqrt(x)
    r = r * r
    return r * (2 - x * r)


def _write(w, k, v, state, valid):
    """(state after a token, weights of the past and of the token in it). An invalid token changes nothing."""
    num, den, p = state
    q = jnp.maximum(p + w, k)
    past, now = jnp.exp((p - q) + w), jnp.exp(k - q)
    if valid is not None:
        q = jnp.where(valid, q, p)
        past, now = jnp.where(valid, past, jnp.ones_like(past)), jnp.where(valid, now, jnp.zeros_like(now))
    return (past * num + now * v, past * den + now, q), past, now


def _forward_kernel(*refs):
    *masks, w_D, u_D, k_BTD, v_BTD, num_BD, den_BD, log_scale_BD = refs[:-5]
    y_BTD, *final, starts_BM3D = refs[-5:]
    b, d, channels = _place()
    w, u = w_D[channels], u_D[channels]

    def block(m, *refs):
        *masks, k_TD, v_TD, state = refs
        for i in range(3):
            starts_BM3D[b, m, i, channels] = state[i]
        for t in range(BLOCK_T):
            k, v = k_TD[t, :].astype(w.dtype), v_TD[t, :].astype(w.dtype)
            state, valid = _token(masks, t, state)
            y_BTD[b, m * BLOCK_T + t, channels] = _read(u, k, v, state)[0].astype(y_BTD.dtype)
            state, _, _ = _write(w, k, v, state, valid)
        return state

    init = tuple(ref[b, channels] for ref in (num_BD, den_BD, log_scale_BD))
    state = _over_blocks(block, masks, [k_BTD, v_BTD], [], b, d, init)
    for ref, x in zip(final, state, strict=True):
        ref[b, channels] = x


def _backward_kernel(*refs):
    *masks, w_D, u_D, k_BTD, v_BTD, starts_BM3D, dy_BTD, dnum_BD, dden_BD = refs[:-6]
    *sums, dk_BTD, dv_BTD = refs[-6:]
    b, d, channels = _place()
    w, u = w_D[channels], u_D[channels]

    def block(m, *refs):
        *masks, k_TD, v_TD, dy_TD, starts_3D, (dw, du, G, H) = refs
        state, tokens = tuple(starts_3D[i, :] for i in range(3)), []
        for t in range(BLOCK_T):
            k, v = k_TD[t, :].astype(w.dtype), v_TD[t, :].astype(w.dtype)
            before, valid = _token(masks, t, state)
            state, a1, a2 = _write(w, k, v, before, valid)
            tokens.append((k, v, before, valid, a1, a2))
        for t in reversed(range(BLOCK_T)):
            k, v, before, valid, a1, a2 = tokens[t]
            num, den, _ = before
            y, inverse, e1, e2 = _read(u, k, v, before)
            g = dy_TD[t, :].astype(w.dtype) * inverse
            du_t, dw_t = e2 * g * (v - y), a1 * (num * G + den * H)
            dk_BTD[b, m * BLOCK_T + t, channels] = (du_t + a2 * (G * v + H)).astype(dk_BTD.dtype)
            dv_BTD[b, m * BLOCK_T + t, channels] = (e2 * g + a2 * G).astype(dv_BTD.dtype)
            dw, du = dw + _where(valid, dw_t, jnp.zeros_like(dw_t)), du + du_t
            # a document's first token read the empty state: its e1 and a1 are 0, which stops the cotangents
            G, H = a1 * G + e1 * g, a1 * H - e1 * g * y
        return dw, du, G, H

    dnum, dden = dnum_BD[b, channels], dden_BD[b, channels]
    init = jnp.zeros_like(dnum), jnp.zeros_like(dnum), dnum, dden
    carry = _over_blocks(block, masks, [k_BTD, v_BTD, dy_BTD], [starts_BM3D], b, d, init, reverse=True)
    for ref, x in zip(sums, carry, strict=True):
        ref[b, channels] = x
