"""WKV of RWKV-5 and RWKV-6 (Eagle and Finch, arXiv:2404.05892): a matrix of key-value pairs, decayed by channel.

For each head, with receptance r, key k, log decay w <= 0 and bonus u in R^K, and value v in R^V,

    read    y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    write   S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

The token is read before it is written: u takes the place of its decay. In RWKV-5 the decay is constant in time.
With dS = dL/dS_t, backward in time,

    dr_t = S_{t-1} dy_t + u * k_t (v_t . dy_t)        dk_t = dS v_t + u * r_t (v_t . dy_t)
    dv_t = dS^T k_t + (sum_K r_t u k_t) dy_t          du   = sum_t r_t * k_t (v_t . dy_t)
    dw_t = exp(w_t) * sum_V dS * S_{t-1}              dL/dS_{t-1} = diag(exp(w_t)) dS + r_t dy_t^T

There are two forms: `scan`, token by token, for a single token, and `chunked`, matrix products over 16 tokens, for
more. There is no associative form as in `wkv4`: each prefix would be a K x V matrix in memory. In a trial it took at
least 6 times as long as chunks, and 2 GB of temporaries (both passes, CPU, B 2, T 1,024, 8 heads of 64).
"""

import jax
import jax.numpy as jnp

from rwkv_jax.ops.chunks import Factors, Rule, by_token, einsum, factors, matmul, recur
from rwkv_jax.ops.dispatch import accumulator_dtype, check_form, check_shapes

FORMS = ("scan", "chunked")


def wkv6(r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK, state=None, *, reset_BT=None, valid_BT=None, impl=None):
    """The recurrence of RWKV-6 for every head, from an incoming state to an outgoing one. No factor scales r or k.

    Args:
        r_BTHK, k_BTHK: receptance and key.
        w_BTHK: log decay per step, <= 0 (-inf forgets at once); or [H, K], the same for all tokens (RWKV-5). The model
            computes -exp(.) of a parameter or activation.
        v_BTHV: values.
        u_HK: bonus of the current token.
        state: [B, H, K, V] before the first token; None is the empty past, zeros.
        reset_BT: True where a new document starts: the token sees nothing before itself.
        valid_BT: False where a token is padding: it leaves the state untouched, its y is 0 and gets no gradient, and a
            reset there is ignored.
        impl: "scan", "chunked", or None for the fastest for T. A named form is never replaced.

    Returns:
        y_BTHV in the dtype of v, and the state [B, H, K, V] after the last token, in the accumulators' dtype:
        float32, or float64 if one of r, w, k, v, u is.

    Raises:
        ValueError: an unknown form, or a mismatched shape.
    """
    check_form(impl, FORMS)
    if r_BTHK.ndim != 4 or r_BTHK.shape != k_BTHK.shape or v_BTHV.shape[:3] != k_BTHK.shape[:3] or v_BTHV.ndim != 4:
        shapes = ", ".join(str(x.shape) for x in (r_BTHK, k_BTHK, v_BTHV))
        raise ValueError(f"r, k and v are {shapes}, expected [B, T, H, K] twice and [B, T, H, V]")
    (B, T, H, K), V = r_BTHK.shape, v_BTHV.shape[3]
    check_shapes(
        w=(w_BTHK, (H, K) if w_BTHK.ndim == 2 else (B, T, H, K)),
        u=(u_HK, (H, K)),
        state=(state, (B, H, K, V)),
        reset_BT=(reset_BT, (B, T)),
        valid_BT=(valid_BT, (B, T)),
    )
    operands = (r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK)
    dtype = accumulator_dtype(*operands)
    state = jnp.zeros((B, H, K, V), dtype) if state is None else state.astype(dtype)
    if T == 0:
        return v_BTHV, state
    rule = RULES[impl or suited_form(T)]
    y_BTHV, state = recur(rule, rule, operands, state, reset_BT, valid_BT)
    return y_BTHV.astype(v_BTHV.dtype), state


def suited_form(T: int) -> str:
    """The fastest form for T tokens, on every platform, with gradients and without.

    Milliseconds of the scan / of chunks on 2 CPU cores, 12 (B 1) and 8 (B 4) heads of 64:

        forward       B 1: T 1  0.03 / 0.03   T 256  6.0 / 5.6       B 4: T 1,024  91 / 64
        gradients     B 1: T 1  0.2 / 0.2     T 16  4.6 / 1.2        B 4: T 1,024  494 / 253

    Not measured elsewhere: a scan over tokens leaves an accelerator idle.
    """
    return "scan" if T == 1 else "chunked"


# ------------------------------------------------------------------------------------ scan over tokens


def _step(state, token):
    r, w, k, v, u = token
    y = einsum("bhk,bhkv->bhv", r, state) + (r * u * k).sum(-1, keepdims=True) * v
    return jnp.exp(w)[..., None] * state + k[..., None] * v[..., None, :], y


def _step_grads(state, token, dstate, dy):
    r, w, k, v, u = token
    decay, vdy = jnp.exp(w), (v * dy).sum(-1, keepdims=True)
    dr = einsum("bhkv,bhv->bhk", state, dy) + u * k * vdy
    dw = decay * (dstate * state).sum(-1)
    dk = einsum("bhkv,bhv->bhk", dstate, v) + u * r * vdy
    dv = einsum("bhkv,bhk->bhv", dstate, k) + (r * u * k).sum(-1, keepdims=True) * dy
    return decay[..., None] * dstate + r[..., None] * dy[..., None, :], (dr, dw, dk, dv, r * k * vdy)


# ------------------------------------------------------------------------------------ chunks of tokens


def _factors(r, w, k, u, reset_BC):
    own = (r * u * k).sum(-1)
    return factors((r,), (k,), w, own[..., None, None], reset_BC)


def _chunk_forward(state, operands, reset_BC):
    """Y = past S + scores V,   S <- whole S + end^T V."""
    r, w, k, v, u = operands
    whole, past, end, scores = _factors(r, w, k, u, reset_BC)
    y = matmul(past, state) + matmul(scores, v)
    return whole.mT * state + matmul(end.mT, v), y, (scores,)


def _chunk_backward(state, operands, reset_BC, kept, dstate, dy):
    r, w, k, v, u = operands
    (scores,) = kept
    (whole, past, end, _), factors_vjp = jax.vjp(lambda *z: _factors(*z, reset_BC), r, w, k, u)
    dv = matmul(end, dstate) + matmul(scores.mT, dy)
    dwhole = (state * dstate).sum(-1)[:, :, None]
    dr, dw, dk, du = factors_vjp(Factors(dwhole, matmul(dy, state.mT), matmul(v, dstate.mT), matmul(dy, v.mT)))
    return whole.mT * dstate + matmul(past.mT, dy), (dr, dw, dk, dv, du)


RULES = {
    "scan": by_token(_step, _step_grads, 32),
    "chunked": Rule(_chunk_forward, _chunk_backward, 16),
}
