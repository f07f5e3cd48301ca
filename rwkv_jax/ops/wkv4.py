"""WKV, the recurrence of RWKV-4: per channel, a weighted average over the past in a state of constant size.

The paper (arXiv:2305.13048, Eq. 16) defines, for each channel, log decay w <= 0 and bonus u,

            sum_{i<t} exp((t-1-i) w + k_i) v_i + exp(u + k_t) v_t
    y_t  =  -----------------------------------------------------
            sum_{i<t} exp((t-1-i) w + k_i)     + exp(u + k_t)

The previous token has weight exp(k), older ones fade by exp(w) a step, and the current token gets the bonus u
instead of a decay. Two running sums a (numerator) and b (denominator) carry the past (Eqs. 19-22):

    read    y_t = (a + exp(u + k_t) v_t) / (b + exp(u + k_t))
    write   a <- exp(w) a + exp(k_t) v_t,    b <- exp(w) b + exp(k_t)

As exp(k) can overflow, both are stored divided by exp(log_scale) (App. D, Eqs. 23-28). Backward in time the
cotangents (G, H) of (a, b) obey a linear recurrence, with g_t = dL/dy_t / denominator_t:

    G_{t-1} = exp(w) G_t + g_t,              H_{t-1} = exp(w) H_t - g_t y_t
    dL/dv_t = exp(u + k_t) g_t             + exp(k_t) G_t
    dL/dk_t = exp(u + k_t) g_t (v_t - y_t) + exp(k_t) (G_t v_t + H_t)
    dL/du   = sum_t exp(u + k_t) g_t (v_t - y_t)
    dL/dw   = sum_t exp(w) (a_{t-1} G_t + b_{t-1} H_t)

They are stored multiplied by exp(log_scale) of their state, as cotangents of num and den. Scaled so, each later token
adds at most |dL/dy| times the state's share in its average (|y| times that for H): no overflow. The backward pass
needs no exponents of its own, and no exponentials beyond those of the forward pass.

Both directions have two forms here: `scan`, token by token, and `associative`, all prefixes at once in log T rounds.
`pallas` (ops/kernels) is a fused kernel. Everything is computed in float32, or in float64 if k or v is float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.ops.dispatch import (
    HOPPER,
    accumulator_dtype,
    check_form,
    check_shapes,
    cuda_capability,
    run_form,
    target_platform,
)
from rwkv_jax.ops.wkv4_algebra import (
    EMPTY,
    FORGET,
    WKV4State,
    choose_states,
    merge_states,
    read_token,
    token_grads,
    write_token,
)

FORMS = ("scan", "associative", "pallas")

CHUNK = 32  # tokens between the states that `scan` keeps for its backward pass; 8 to 64 are within 6 % on a CPU
STEP = 2  # tokens in one step of its loops: forward and backward 12 % faster than with 1 or 4 on a CPU


def wkv4(w_D, u_D, k_BTD, v_BTD, state=None, *, reset_BT=None, valid_BT=None, impl=None):
    """Eq. 16 for every channel, from an incoming state to an outgoing one.

    Args:
        w_D: log decay per step, <= 0 (-inf forgets at once); the model computes -exp(time_decay).
        u_D: bonus of the current token.
        k_BTD, v_BTD: log weights (up to 1e37 either way) and values.
        state: `WKV4State` before the first token; None is the empty past.
        reset_BT: True where a new document starts: the token sees nothing before itself.
        valid_BT: False where a token is padding: it leaves the state untouched, its y is meaningless and gets no
            gradient, and a reset there is ignored.
        impl: "scan", "associative", "pallas" (kernels for TPUs, interpreted on a CPU, and for NVIDIA GPUs from Hopper
            on), or None for the fastest on `target_platform()`. Where that is a kernel, arrays committed to the
            host's CPU take "scan". A named form is never replaced. To compile for a TPU on another machine, pass
            "pallas" or trace under `jax.set_mesh` of the TPU's devices.

    Returns:
        y_BTD in the dtype of v, inside [min v, max v] of the tokens seen, and the `WKV4State` after the last token,
        in the accumulators' dtype: float32, or float64 if k or v is.

    Raises:
        ValueError: an unknown form, a mismatched shape, or "pallas" with float64 on a GPU.
    """
    check_form(impl, FORMS)
    if k_BTD.ndim != 3 or k_BTD.shape != v_BTD.shape:
        raise ValueError(f"k and v are {k_BTD.shape} and {v_BTD.shape}, expected one shape [B, T, D]")
    B, T, D = k_BTD.shape
    masks = {"reset_BT": (reset_BT, (B, T)), "valid_BT": (valid_BT, (B, T))}
    state = None if state is None else WKV4State(*state)
    past = {} if state is None else {f"state.{name}": (x, (B, D)) for name, x in state._asdict().items()}
    check_shapes(w=(w_D, (D,)), u=(u_D, (D,)), **masks, **past)
    platform, dtype = target_platform(), accumulator_dtype(k_BTD, v_BTD)
    if impl == "pallas" and platform == "gpu" and dtype == jnp.float64:
        raise ValueError("impl is 'pallas' on a GPU, whose kernel has no float64: expected float32, or another form")
    form = impl or suited_form(platform, T, dtype)
    return _applied(form, w_D, u_D, k_BTD, v_BTD, state, reset_BT, valid_BT)


def suited_form(platform: str, T: int, dtype) -> str:
    """Return the fastest form on a platform, for T tokens and a dtype of the accumulators.

    "tpu" and "gpu" are the two kernels behind "pallas". A single token takes "scan" everywhere. Otherwise:

    CPU: measured on 2 cores, scan is the fastest at every length and size (experiments/speed/results.json).
    TPU: compiled for v5e, v5p and v6e, not run. On v5e and v5p, forward and backward at B 8, T 4,096, D 1,024,
      bfloat16: associative accesses 66 to 70 times the bytes of inputs and outputs and takes 2.0 GB beside them, the
      kernel 0.07 GB.
    CUDA: measured on an H100, forward and backward at B 8, T 4,096, D 4,096, bfloat16: the kernel 1.2 ms,
      associative 11.6, scan 118, the released CUDA kernel 4.2 (experiments/speed/wkv.json). The kernel needs Hopper.
    """
    if T == 1 or platform == "cpu":
        return "scan"
    if platform == "tpu":
        return "tpu"
    return "gpu" if platform == "gpu" and dtype != jnp.float64 and cuda_capability() >= HOPPER else "associative"


# Outside `jax.jit` it is compiled once for its shapes; inside, it is traced once for all layers.
@partial(jax.jit, static_argnums=0)
def _applied(form, w_D, u_D, k_BTD, v_BTD, state, reset_BT, valid_BT):
    (B, T, D), dtype = k_BTD.shape, accumulator_dtype(k_BTD, v_BTD)
    state = WKV4State.empty(B, D, dtype) if state is None else jax.tree.map(lambda x: x.astype(dtype), state)
    if T == 0:
        return v_BTD, state
    if reset_BT is not None and valid_BT is not None:
        reset_BT = reset_BT & valid_BT
    operands = (w_D.astype(dtype)[None], u_D.astype(dtype)[None], k_BTD, v_BTD, state, reset_BT, valid_BT)
    return run_form(_wkv4, form, *operands, gpu_kernel=dtype != jnp.float64)


# ------------------------------------------------------------------------------------ scan over tokens


def _padded(k_BTD, v_BTD, reset_BT, valid_BT):
    """Inputs with T rounded up to whole chunks, the added tokens invalid."""
    B, T, _ = k_BTD.shape
    chunk = min(CHUNK, -(-T // STEP) * STEP if T > 1 else 1)
    extra = -T % chunk
    if extra:
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        k_BTD, v_BTD = (jnp.pad(x, ((0, 0), (0, extra), (0, 0))) for x in (k_BTD, v_BTD))
        reset_BT, valid_BT = (None if x is None else jnp.pad(x, ((0, 0), (0, extra))) for x in (reset_BT, valid_BT))
    return chunk, k_BTD, v_BTD, reset_BT, valid_BT


def _at(x, t, axis=1):
    """x[:, t]. Indexing inside the loop is cheaper than transposing the operands to time-major."""
    return None if x is None else lax.dynamic_index_in_dim(x, t, axis=axis, keepdims=False)


def _put(x, x_t, t, axis=1):
    return lax.dynamic_update_index_in_dim(x, x_t, t, axis=axis)


def _each(token, carry, chunk, reverse=False):
    """Apply `token(carry, i)` to every i of a chunk, `STEP` of them in one step of the loop."""
    step = min(STEP, chunk)

    def tokens(carry, first):
        for i in range(step)[:: -1 if reverse else 1]:
            carry = token(carry, first + i)
        return carry, None

    return lax.scan(tokens, carry, jnp.arange(0, chunk, step), reverse=reverse)[0]


def _scan_forward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    """(y, final state, states [M, B, D] at the start of each chunk).

    Results are gathered in float32 and rounded at the end: to update a bfloat16 array in a loop, XLA's CPU compiler
    converts all of it each time (8 times as long forward at B 4, T 1,024, D 512).
    """
    T = k_BTD.shape[1]
    dtype, empty = state.num.dtype, WKV4State.empty(*state.num.shape, state.num.dtype)
    chunk, k_BTD, v_BTD, reset_BT, valid_BT = _padded(k_BTD, v_BTD, reset_BT, valid_BT)

    def one_chunk(carry, start):
        def token(carry, i):
            (state, y_BTD), t = carry, start + i
            k, v = _at(k_BTD, t).astype(dtype), _at(v_BTD, t).astype(dtype)
            state = choose_states(_at(reset_BT, t), empty, state)
            new = write_token(w, k, v, state)[0]
            new = new if valid_BT is None else choose_states(_at(valid_BT, t), new, state)
            return new, _put(y_BTD, read_token(u, k, v, state)[0], t)

        return _each(token, carry, chunk), carry[0]

    starts = jnp.arange(0, k_BTD.shape[1], chunk)
    (state, y_BTD), starts_MBD = lax.scan(one_chunk, (state, jnp.zeros(v_BTD.shape, dtype)), starts)
    return y_BTD[:, :T].astype(v_BTD.dtype), state, starts_MBD


def _scan_backward(w, u, k_BTD, v_BTD, starts_MBD, reset_BT, valid_BT, dy_BTD, dstate):
    """(dw, du [B, D], dk, dv, dstate): a reverse scan over chunks, each of which recomputes its states.

    `dstate`, the cotangent (num, den) of the state, is that after the last token as input, before the first as output.
    """
    T, (B, D), dtype = k_BTD.shape[1], dstate[0].shape, dstate[0].dtype
    empty = WKV4State.empty(B, D, dtype)
    chunk, k_BTD, v_BTD, reset_BT, valid_BT = _padded(k_BTD, v_BTD, reset_BT, valid_BT)
    dy_BTD = jnp.pad(dy_BTD, ((0, 0), (0, k_BTD.shape[1] - T), (0, 0)))

    def one_chunk(carry, start_and_state):
        start, state = start_and_state

        def recompute(carry, i):
            (state, kept), t = carry, start + i
            state = choose_states(_at(reset_BT, t), empty, state)
            new, past, now = write_token(w, _at(k_BTD, t).astype(dtype), _at(v_BTD, t).astype(dtype), state)
            if valid_BT is not None:
                unwritten = (state, jnp.ones_like(past), jnp.zeros_like(now))
                new, past, now = choose_states(_at(valid_BT, t), (new, past, now), unwritten)
            return new, jax.tree.map(lambda x_CBD, x: _put(x_CBD, x, i, axis=0), kept, (state, past, now))

        def token(carry, i):
            (dstate, dw, du, dk_BTD, dv_BTD), t = carry, start + i
            k, v, dy = (_at(x, t).astype(dtype) for x in (k_BTD, v_BTD, dy_BTD))
            state, past, now = jax.tree.map(lambda x_CBD: _at(x_CBD, i, axis=0), kept)
            (dw_t, du_t, dk, dv), dstate = token_grads(u, k, v, dy, state, past, now, dstate)
            dw_t = dw_t if valid_BT is None else jnp.where(_at(valid_BT, t)[:, None], dw_t, 0)
            dstate = choose_states(_at(reset_BT, t), jax.tree.map(jnp.zeros_like, dstate), dstate)
            return dstate, dw + dw_t, du + du_t, _put(dk_BTD, dk, t), _put(dv_BTD, dv, t)

        carry, kept = carry
        _, kept = _each(recompute, (state, kept), chunk)
        return (_each(token, carry, chunk, reverse=True), kept), None

    zeros_BD, zeros_BTD, zeros_CBD = (jnp.zeros(shape, dtype) for shape in ((B, D), k_BTD.shape, (chunk, B, D)))
    kept = (WKV4State(*[zeros_CBD] * 3), zeros_CBD, zeros_CBD)
    starts = jnp.arange(0, k_BTD.shape[1], chunk)
    carry = (dstate, zeros_BD, zeros_BD, zeros_BTD, zeros_BTD)
    ((dstate, dw, du, dk_BTD, dv_BTD), _), _ = lax.scan(one_chunk, (carry, kept), (starts, starts_MBD), reverse=True)
    return dw, du, dk_BTD[:, :T].astype(k_BTD.dtype), dv_BTD[:, :T].astype(v_BTD.dtype), dstate


# --------------------------------------------------------------------------------- associative scan


def _associative_states(w, k, v, state, reset_BT, valid_BT):
    """(states that the tokens read, states after them), each [B, T, D]."""
    tokens_BTD = WKV4State(v, jnp.ones_like(v), k)
    tokens_BTD = tokens_BTD if valid_BT is None else choose_states(valid_BT, tokens_BTD, _empty_like(k))
    decay_BTD = jnp.broadcast_to(jnp.maximum(w, FORGET)[None], k.shape)
    decay_BTD = decay_BTD if valid_BT is None else jnp.where(valid_BT[..., None], decay_BTD, 0.0)
    decay_BTD = decay_BTD if reset_BT is None else jnp.where(reset_BT[..., None], FORGET, decay_BTD)
    # the incoming state enters as a token of its own before the first one
    tokens_BTD = jax.tree.map(lambda s, x: jnp.concatenate([s[:, None], x], axis=1), state, tokens_BTD)
    decay_BTD = jnp.concatenate([jnp.zeros_like(decay_BTD[:, :1]), decay_BTD], axis=1)

    def combine(left, right):
        (w1, s1), (w2, s2) = left, right
        return jnp.maximum(w1 + w2, FORGET), merge_states(w2, s1, s2)

    states_BTD = lax.associative_scan(combine, (decay_BTD, tokens_BTD), axis=1)[1]
    before_BTD = choose_states(reset_BT, _empty_like(k), jax.tree.map(lambda x: x[:, :-1], states_BTD))
    return before_BTD, jax.tree.map(lambda x: x[:, 1:], states_BTD)


def _empty_like(x_BTD):
    return WKV4State(jnp.zeros_like(x_BTD), jnp.zeros_like(x_BTD), jnp.full_like(x_BTD, EMPTY))


def _associative_forward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    k, v = k_BTD.astype(state.num.dtype), v_BTD.astype(state.num.dtype)
    before_BTD, after_BTD = _associative_states(w, k, v, state, reset_BT, valid_BT)
    final = jax.tree.map(lambda x: x[:, -1], after_BTD)
    return read_token(u[None], k, v, before_BTD)[0].astype(v_BTD.dtype), final, state


def _associative_backward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT, dy_BTD, dstate):
    """Gradients by an associative scan: the cotangents obey a linear recurrence with the known factors `past`."""
    k, v, dy = (x.astype(state.num.dtype) for x in (k_BTD, v_BTD, dy_BTD))
    before_BTD, (_, _, after_scale) = _associative_states(w, k, v, state, reset_BT, valid_BT)
    # merging padding leaves the value of a state as it is, but may change its log_scale
    decay = w[None] if valid_BT is None else jnp.where(valid_BT[..., None], w[None], 0)
    past, now = jnp.exp((before_BTD.log_scale - after_scale) + decay), jnp.exp(k - after_scale)
    now = now if valid_BT is None else jnp.where(valid_BT[..., None], now, 0)

    zeros_BTD = (jnp.zeros_like(v), jnp.zeros_like(v))
    _, reads_BTD = token_grads(u[None], k, v, dy, before_BTD, past, now, zeros_BTD)
    factors_BTD, reads_BTD = choose_states(reset_BT, (zeros_BTD[0], zeros_BTD), (past, reads_BTD))
    # the cotangent of the final state enters as one more token after the last
    reads_BTD = jax.tree.map(lambda x, s: jnp.concatenate([x, s[:, None]], axis=1), reads_BTD, dstate)
    factors_BTD = jnp.concatenate([factors_BTD, jnp.ones_like(factors_BTD[:, :1])], axis=1)

    def combine(later, earlier):
        (f1, x1), (f2, x2) = later, earlier
        return f1 * f2, jax.tree.map(lambda a, b: f2 * a + b, x1, x2)

    _, cotangents_BTD = lax.associative_scan(combine, (factors_BTD, reads_BTD), axis=1, reverse=True)
    after_BTD = jax.tree.map(lambda x: x[:, 1:], cotangents_BTD)
    (dw, du, dk, dv), _ = token_grads(u[None], k, v, dy, before_BTD, past, now, after_BTD)
    dw = dw if valid_BT is None else jnp.where(valid_BT[..., None], dw, 0)
    dstate = jax.tree.map(lambda x: x[:, 0], cotangents_BTD)
    return dw.sum(1), du.sum(1), dk.astype(k_BTD.dtype), dv.astype(v_BTD.dtype), dstate


# ------------------------------------------------------------------------------- one differentiable op


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv4(form, w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    return _forward(form, w, u, k_BTD, v_BTD, state, reset_BT, valid_BT)[0]


def _forward(form, w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    saved = (w, u, k_BTD, v_BTD, state, reset_BT, valid_BT)
    forward, _ = _passes(form)
    y_BTD, final, starts = forward(*saved)
    y_BTD, starts = checkpoint_name((y_BTD, starts), "mixed")  # saved by a remat policy, the recurrence never reruns
    return (y_BTD, final), (saved, starts)


def _backward(form, residuals, cotangents):
    (w, u, k_BTD, v_BTD, state, reset_BT, valid_BT), starts = residuals
    dy_BTD, dfinal = cotangents
    dy_BTD = dy_BTD if valid_BT is None else jnp.where(valid_BT[..., None], dy_BTD, 0)
    _, backward = _passes(form)
    dw, du, dk_BTD, dv_BTD, (dnum, dden) = backward(
        w, u, k_BTD, v_BTD, starts, reset_BT, valid_BT, dy_BTD, (dfinal.num, dfinal.den)
    )
    dstate = WKV4State(dnum, dden, state.num * dnum + state.den * dden)
    return dw.sum(0, keepdims=True), du.sum(0, keepdims=True), dk_BTD, dv_BTD, dstate, None, None


def _passes(form):
    """(forward, backward) of a form. Forward returns y, the final state and the states that backward needs.

    Kernels are imported only when chosen: each needs a compiler that not every platform has.
    """
    if form == "scan":
        return _scan_forward, _scan_backward
    if form == "associative":
        return _associative_forward, _associative_backward
    if form == "gpu":
        from rwkv_jax.ops.kernels import wkv4_gpu

        return wkv4_gpu.forward, wkv4_gpu.backward
    from rwkv_jax.ops.kernels import wkv4_tpu

    interpret = form == "interpreted"
    return partial(wkv4_tpu.forward, interpret=interpret), partial(wkv4_tpu.backward, interpret=interpret)


_wkv4.defvjp(_forward, _backward)
