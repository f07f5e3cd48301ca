"""WKV, the recurrence of RWKV-4: per channel, a weighted average over the past that any length can carry.

The paper (arXiv:2305.13048, Eq. 16) defines, for each channel, log decay w <= 0 and bonus u,

            sum_{i<t} exp((t-1-i) w + k_i) v_i + exp(u + k_t) v_t
    y_t  =  -----------------------------------------------------
            sum_{i<t} exp((t-1-i) w + k_i)     + exp(u + k_t)

The previous token has weight exp(k), older ones fade by exp(w) a step, and the current token gets the bonus u
instead of a decay. Two running sums a (numerator) and b (denominator) carry the past (Eqs. 19-22):

    read    y_t = (a + exp(u + k_t) v_t) / (b + exp(u + k_t))
    write   a <- exp(w) a + exp(k_t) v_t,    b <- exp(w) b + exp(k_t)

and as exp(k) overflows, both are stored divided by exp(log_scale) (App. D, Eqs. 23-28). Backward in time the
cotangents (G, H) of (a, b) obey the same kind of recurrence, with g_t = dL/dy_t / denominator_t:

    G_{t-1} = exp(w) G_t + g_t,              H_{t-1} = exp(w) H_t - g_t y_t
    dL/dv_t = exp(u + k_t) g_t             + exp(k_t) G_t
    dL/dk_t = exp(u + k_t) g_t (v_t - y_t) + exp(k_t) (G_t v_t + H_t)
    dL/du   = sum_t exp(u + k_t) g_t (v_t - y_t)
    dL/dw   = sum_t exp(w) (a_{t-1} G_t + b_{t-1} H_t)

Both directions are here in two forms: `scan`, one token after the other, and `associative`, all prefixes at once
in log T rounds. `blocked` (ops/wkv4_blocked.py) scans chunks side by side, `pallas` (ops/kernels) is a fused kernel.
Everything is computed in float32 whatever comes in (float64 for float64).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FORMS = ("scan", "blocked", "associative", "pallas")

CHUNK = 32  # tokens between the states that the backward pass of `scan` keeps; it recomputes those in between
EMPTY = -1e38  # log_scale of "nothing seen yet": exp(EMPTY - anything) is 0, and it stays finite when decayed
FORGET = -2e38  # log decay that drops the past at a reset: below EMPTY, so that an empty past cannot survive it


class WKV4State(NamedTuple):
    """The past of every channel: a = num * exp(log_scale), b = den * exp(log_scale), each [B, D].

    (num, den, log_scale) and (num e^-c, den e^-c, log_scale + c) are the same state. Gradients are those of
    functions of a and b: a returned log_scale is a constant, num and den carry the whole cotangent, which is
    exact for anything that only feeds the state back into `wkv4`. The gradient of the empty state is zero.
    """

    num: jax.Array
    den: jax.Array
    log_scale: jax.Array

    @classmethod
    def empty(cls, batch: int, dim: int, dtype=jnp.float32) -> "WKV4State":
        # an array for each leaf, so that a state can be donated
        zeros = lambda: jnp.zeros((batch, dim), dtype)
        return cls(zeros(), zeros(), jnp.full((batch, dim), EMPTY, dtype))


def wkv4(w_D, u_D, k_BTD, v_BTD, state=None, *, reset_BT=None, valid_BT=None, impl=None):
    """Eq. 16 for every channel, from an incoming state to an outgoing one.

    Args:
        w_D: log decay per step, <= 0 (-inf forgets at once); the model computes -exp(time_decay).
        u_D: bonus of the current token.
        k_BTD, v_BTD: log weights (up to 1e37 either way) and values.
        state: `WKV4State` before the first token; None is the empty past.
        reset_BT: True where a new document starts: the token sees nothing before itself.
        valid_BT: False where a token is padding and leaves the state untouched (a reset there is ignored).
        impl: "scan", "blocked", "associative", "pallas" (a kernel for TPU, interpreted on a CPU), or None for the one
            that suits the platform and the shape. A named form is never replaced.

    Returns:
        y_BTD in the dtype of v, inside [min v, max v] of the tokens seen, and the `WKV4State` after the last token.
    """
    B, T, D = _check(w_D, u_D, k_BTD, v_BTD, state, reset_BT, valid_BT, impl)
    dtype = jnp.promote_types(jnp.promote_types(k_BTD.dtype, v_BTD.dtype), jnp.float32)
    state = WKV4State.empty(B, D, dtype) if state is None else jax.tree.map(lambda x: x.astype(dtype), state)
    if T == 0:
        return v_BTD, state
    if reset_BT is not None and valid_BT is not None:
        reset_BT = reset_BT & valid_BT
    operands = (w_D.astype(dtype)[None], u_D.astype(dtype)[None], k_BTD, v_BTD, state, reset_BT, valid_BT)
    if impl is None and T == 1:
        impl = "scan"
    if impl is not None:
        return _wkv4(impl, *operands)
    # Chosen when lowering, so that compiling for a TPU on a CPU picks the TPU's form. On accelerators a scan is
    # one dispatch a token; on a 2-core CPU associative takes 1.4 to 2 times as long (B 4, T 1,024, D 512).
    return lax.platform_dependent(*operands, cpu=partial(_wkv4, "scan"), default=partial(_wkv4, "associative"))


def _check(w_D, u_D, k_BTD, v_BTD, state, reset_BT, valid_BT, impl):
    if impl is not None and impl not in FORMS:
        raise ValueError(f"impl is {impl!r}, expected None or one of {', '.join(FORMS)}")
    if k_BTD.ndim != 3 or k_BTD.shape != v_BTD.shape:
        raise ValueError(f"k and v are {k_BTD.shape} and {v_BTD.shape}, expected one shape [B, T, D]")
    B, T, D = k_BTD.shape
    for name, x, shape in (
        ("w", w_D, (D,)),
        ("u", u_D, (D,)),
        ("reset_BT", reset_BT, (B, T)),
        ("valid_BT", valid_BT, (B, T)),
        *((f"state.{field}", getattr(state, field, None), (B, D)) for field in WKV4State._fields),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {x.shape}, expected {shape}")
    return B, T, D


# ------------------------------------------------------------------------------------------- one token


def _rescale(p1, shift1, p2, shift2):
    """Common scale of two terms with exponents p + shift: (q, exp(p1 + shift1 - q), exp(p2 + shift2 - q)).

    Differences first: q is rounded, and (p - q) + shift recovers what rounding took, where p + shift - q would
    lose a small decay beside a large exponent at every step.
    """
    q = lax.stop_gradient(jnp.maximum(p1 + shift1, p2 + shift2))  # the gauge of `WKV4State`
    return q, jnp.exp((p1 - q) + shift1), jnp.exp((p2 - q) + shift2)


def _write(w, k, v, state):
    """The state after a token."""
    q, past, now = _rescale(state.log_scale, w, k, 0.0)
    return WKV4State(past * state.num + now * v, past * state.den + now, q)


def read(u, k, v, state):
    """(y, denominator, its log scale, weight of the current token in it)."""
    q, past, now = _rescale(state.log_scale, 0.0, k, u)
    den = past * state.den + now
    return (past * state.num + now * v) / den, den, q, now


def token_grads(w, u, k, v, dy, before, after):
    """(dw, du, dk, dv) of one token and what it adds to the cotangents of the state before it.

    `before` is the state that the token read; `after` holds the cotangents (G, H) of the state that it wrote, as a
    `WKV4State` (num, den, log_scale) of their own: G = num * exp(log_scale).
    """
    y, den, q, now = read(u, k, v, before)
    g = dy / den
    own = now * g
    later = jnp.exp(k + after.log_scale)
    du = own * (v - y)
    dv = own + later * after.num
    dk = du + later * (after.num * v + after.den)
    dw = jnp.exp((before.log_scale + after.log_scale) + w) * (before.num * after.num + before.den * after.den)
    return (dw, du, dk, dv), WKV4State(g, -g * y, -q)


def merge(w, earlier, later):
    """State `earlier` decayed by w, plus `later`."""
    q, e1, e2 = _rescale(earlier.log_scale, w, later.log_scale, 0.0)
    return WKV4State(e1 * earlier.num + e2 * later.num, e1 * earlier.den + e2 * later.den, q)


def _where(mask, a, b):
    """Choose whole states by a boolean mask without a channel axis; None chooses b."""
    return b if mask is None else jax.tree.map(lambda x, y: jnp.where(mask[..., None], x, y), a, b)


# ------------------------------------------------------------------------------------ scan over tokens


def padded(k_BTD, v_BTD, reset_BT, valid_BT):
    """Inputs with T rounded up to whole chunks, the added tokens invalid."""
    B, T, _ = k_BTD.shape
    chunk = min(CHUNK, T)
    extra = -T % chunk
    if extra:
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        k_BTD, v_BTD = (jnp.pad(x, ((0, 0), (0, extra), (0, 0))) for x in (k_BTD, v_BTD))
        reset_BT, valid_BT = (None if x is None else jnp.pad(x, ((0, 0), (0, extra))) for x in (reset_BT, valid_BT))
    return chunk, k_BTD, v_BTD, reset_BT, valid_BT


def _at(x_BT, t):
    """x[:, t]. Indexing inside the loop is cheaper than transposing the operands to time-major."""
    return None if x_BT is None else lax.dynamic_index_in_dim(x_BT, t, axis=1, keepdims=False)


def scan_forward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    """(y, final state, states [M, B, D] at the start of each chunk).

    Results are gathered in float32 and rounded at the end: XLA's CPU compiler updates a bfloat16 array in a loop by
    converting all of it each time (8 times as long forward at B 4, T 1,024, D 512).
    """
    T = k_BTD.shape[1]
    dtype, empty = state.num.dtype, WKV4State.empty(*state.num.shape, state.num.dtype)
    chunk, k_BTD, v_BTD, reset_BT, valid_BT = padded(k_BTD, v_BTD, reset_BT, valid_BT)

    def token(carry, t):
        state, y_BTD = carry
        k, v = _at(k_BTD, t).astype(dtype), _at(v_BTD, t).astype(dtype)
        state = _where(_at(reset_BT, t), empty, state)
        y = read(u, k, v, state)[0]
        new = _write(w, k, v, state)
        new = new if valid_BT is None else _where(_at(valid_BT, t), new, state)
        return (new, lax.dynamic_update_index_in_dim(y_BTD, y, t, axis=1)), None

    def tokens(carry, start):
        return lax.scan(token, carry, start + jnp.arange(chunk))[0], carry[0]

    (state, y_BTD), starts_MBD = lax.scan(
        tokens, (state, jnp.zeros(v_BTD.shape, dtype)), jnp.arange(0, k_BTD.shape[1], chunk)
    )
    return y_BTD[:, :T].astype(v_BTD.dtype), state, starts_MBD


def scan_backward(w, u, k_BTD, v_BTD, starts_MBD, reset_BT, valid_BT, dy_BTD, dstate):
    """Reverse scan over chunks, each recomputing its states; `dstate` is the cotangent after the last token."""
    T = k_BTD.shape[1]
    dtype, empty = dstate.num.dtype, WKV4State.empty(*dstate.num.shape, dstate.num.dtype)
    chunk, k_BTD, v_BTD, reset_BT, valid_BT = padded(k_BTD, v_BTD, reset_BT, valid_BT)
    dy_BTD = jnp.pad(dy_BTD, ((0, 0), (0, k_BTD.shape[1] - T), (0, 0)))

    def recompute(state, t):
        state = _where(_at(reset_BT, t), empty, state)
        new = _write(w, _at(k_BTD, t).astype(dtype), _at(v_BTD, t).astype(dtype), state)
        return (new if valid_BT is None else _where(_at(valid_BT, t), new, state)), state

    def token(carry, t_and_state):
        dstate, dw, du, dk_BTD, dv_BTD = carry
        t, state = t_and_state
        k, v, dy = (_at(x, t).astype(dtype) for x in (k_BTD, v_BTD, dy_BTD))
        valid = _at(valid_BT, t)
        after = dstate if valid is None else _where(valid, dstate, empty)
        (dw_t, du_t, dk_t, dv_t), cotangent = token_grads(w, u, k, v, dy, state, after)
        decay = w if valid is None else jnp.where(valid[:, None], w, 0.0)
        dstate = _where(_at(reset_BT, t), empty, merge(decay, dstate, cotangent))
        put = lambda x_BTD, x: lax.dynamic_update_index_in_dim(x_BTD, x, t, axis=1)
        return (dstate, dw + dw_t, du + du_t, put(dk_BTD, dk_t), put(dv_BTD, dv_t)), None

    def tokens(carry, start_and_state):
        start, state = start_and_state
        times = start + jnp.arange(chunk)
        _, states_CBD = lax.scan(recompute, state, times)
        return lax.scan(token, carry, (times, states_CBD), reverse=True)[0], None

    zeros_BD = jnp.zeros_like(dstate.num)
    carry = (dstate, zeros_BD, zeros_BD, jnp.zeros(k_BTD.shape, dtype), jnp.zeros(v_BTD.shape, dtype))
    starts = jnp.arange(0, k_BTD.shape[1], chunk)
    (dstate, dw, du, dk_BTD, dv_BTD), _ = lax.scan(tokens, carry, (starts, starts_MBD), reverse=True)
    return dw, du, dk_BTD[:, :T].astype(k_BTD.dtype), dv_BTD[:, :T].astype(v_BTD.dtype), dstate


# --------------------------------------------------------------------------------- associative scan


def _prefixes(decay_BTD, state_BTD, reverse=False):
    """For every t, the merge of all states up to t, each decayed by the steps that follow it."""

    def combine(left, right):
        (w1, s1), (w2, s2) = left, right
        return jnp.maximum(w1 + w2, FORGET), merge(w2, s1, s2)

    return lax.associative_scan(combine, (decay_BTD, state_BTD), axis=1, reverse=reverse)[1]


def _decays(w, like_BTD, reset_BT, valid_BT):
    decay_BTD = jnp.broadcast_to(jnp.maximum(w, FORGET)[None], like_BTD.shape)
    if valid_BT is not None:
        decay_BTD = jnp.where(valid_BT[..., None], decay_BTD, 0.0)
    if reset_BT is not None:
        decay_BTD = jnp.where(reset_BT[..., None], FORGET, decay_BTD)
    return decay_BTD


def _associative_states(w, k_BTD, v_BTD, state, reset_BT, valid_BT):
    """(the state that each token reads, the state after the last token)."""
    empty_BTD = WKV4State(jnp.zeros_like(v_BTD), jnp.zeros_like(v_BTD), jnp.full_like(k_BTD, EMPTY))
    tokens_BTD = WKV4State(v_BTD, jnp.ones_like(v_BTD), k_BTD)
    tokens_BTD = tokens_BTD if valid_BT is None else _where(valid_BT, tokens_BTD, empty_BTD)
    # the incoming state enters as a token of its own before the first one
    tokens_BTD = jax.tree.map(lambda s, x: jnp.concatenate([s[:, None], x], axis=1), state, tokens_BTD)
    decay_BTD = _decays(w, k_BTD, reset_BT, valid_BT)
    decay_BTD = jnp.concatenate([jnp.zeros_like(decay_BTD[:, :1]), decay_BTD], axis=1)
    states_BTD = _prefixes(decay_BTD, tokens_BTD)
    read_BTD = jax.tree.map(lambda x: x[:, :-1], states_BTD)
    return _where(reset_BT, empty_BTD, read_BTD), jax.tree.map(lambda x: x[:, -1], states_BTD)


def _associative_forward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    k, v = k_BTD.astype(state.num.dtype), v_BTD.astype(state.num.dtype)
    read_BTD, final = _associative_states(w, k, v, state, reset_BT, valid_BT)
    return read(u[None], k, v, read_BTD)[0].astype(v_BTD.dtype), final, state


def _associative_backward(w, u, k_BTD, v_BTD, state, reset_BT, valid_BT, dy_BTD, dstate):
    k, v, dy = (x.astype(state.num.dtype) for x in (k_BTD, v_BTD, dy_BTD))
    read_BTD, _ = _associative_states(w, k, v, state, reset_BT, valid_BT)
    empty_BTD = WKV4State(jnp.zeros_like(v), jnp.zeros_like(v), jnp.full_like(k, EMPTY))
    y, den, q, _ = read(u[None], k, v, read_BTD)
    g = dy / den
    reads_BTD = _where(reset_BT, empty_BTD, WKV4State(g, -g * y, -q))
    # the cotangent of the final state enters as one more token after the last
    reads_BTD = jax.tree.map(lambda x, s: jnp.concatenate([x, s[:, None]], axis=1), reads_BTD, dstate)
    decay_BTD = _decays(w, k, reset_BT, valid_BT)
    decay_BTD = jnp.concatenate([decay_BTD, jnp.zeros_like(decay_BTD[:, :1])], axis=1)
    cotangents_BTD = _prefixes(decay_BTD, reads_BTD, reverse=True)
    after_BTD = jax.tree.map(lambda x: x[:, 1:], cotangents_BTD)
    after_BTD = after_BTD if valid_BT is None else _where(valid_BT, after_BTD, empty_BTD)
    (dw, du, dk, dv), _ = token_grads(w[None], u[None], k, v, dy, read_BTD, after_BTD)
    dstate = jax.tree.map(lambda x: x[:, 0], cotangents_BTD)
    return dw.sum(1), du.sum(1), dk.astype(k_BTD.dtype), dv.astype(v_BTD.dtype), dstate


# ------------------------------------------------------------------------------- one differentiable op


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv4(impl, w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    return _forward(impl, w, u, k_BTD, v_BTD, state, reset_BT, valid_BT)[0]


def _forward(impl, w, u, k_BTD, v_BTD, state, reset_BT, valid_BT):
    saved = (w, u, k_BTD, v_BTD, state, reset_BT, valid_BT)
    y_BTD, final, starts = _form(impl, "forward")(*saved)
    return (y_BTD, final), (saved, starts, final.log_scale)


def _backward(impl, residuals, cotangents):
    (w, u, k_BTD, v_BTD, state, reset_BT, valid_BT), starts, final_log_scale = residuals
    dy_BTD, dfinal = cotangents
    dfinal = WKV4State(dfinal.num, dfinal.den, -final_log_scale)
    dw, du, dk_BTD, dv_BTD, d = _form(impl, "backward")(w, u, k_BTD, v_BTD, starts, reset_BT, valid_BT, dy_BTD, dfinal)
    scale = jnp.exp(state.log_scale + d.log_scale)
    dnum, dden = scale * d.num, scale * d.den
    dstate = WKV4State(dnum, dden, state.num * dnum + state.den * dden)
    return dw.sum(0, keepdims=True), du.sum(0, keepdims=True), dk_BTD, dv_BTD, dstate, None, None


def _form(impl, direction):
    """The pass of a form: forward -> (y, final state, what its backward pass wants of the states)."""
    if impl == "scan":
        return {"forward": scan_forward, "backward": scan_backward}[direction]
    if impl == "associative":
        return {"forward": _associative_forward, "backward": _associative_backward}[direction]
    if impl == "blocked":
        from rwkv_jax.ops import wkv4_blocked

        return getattr(wkv4_blocked, direction)
    from rwkv_jax.ops.kernels import wkv4_tpu

    kernel = getattr(wkv4_tpu, direction)
    return lambda *operands: lax.platform_dependent(*operands, tpu=kernel, cpu=partial(kernel, interpret=True))


_wkv4.defvjp(_forward, _backward)
