"""WKV of RWKV-5 and RWKV-6 (Eagle and Finch, arXiv:2404.05892): a matrix of key-value pairs, decayed by channel.

For each head, with receptance r, key k, log decay w <= 0 and bonus u in R^K, and value v in R^V,

    read    y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    write   S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

The token is read before it is written: u takes the place of its decay. In RWKV-5 the decay is the same at all times.
With dS = dL/dS_t, backward in time,

    dr_t = S_{t-1} dy_t + u * k_t (v_t . dy_t)        dk_t = dS v_t + u * r_t (v_t . dy_t)
    dv_t = dS^T k_t + (sum_K r_t u k_t) dy_t          du   = sum_t r_t * k_t (v_t . dy_t)
    dw_t = exp(w_t) * sum_V dS * S_{t-1}              dL/dS_{t-1} = diag(exp(w_t)) dS + r_t dy_t^T

There are two forms: `scan`, one token after the other, and `chunked`, products of matrices over 16 tokens, which is
the one that trains. There is none that scans over all prefixes at once, as `wkv4` has: each prefix would be a K x V
matrix in memory. An outside trial at T 1,024 took 6 to 9 times as long as chunks, and 2 GB (CPU, B 2, 8 heads of 64).
"""

import jax.numpy as jnp

from rwkv_jax.ops.chunks import by_chunk, by_token, decayed_scores, documents, matmul, recur
from rwkv_jax.ops.dispatch import accumulator_dtype, check_form, check_shapes, target_platform

FORMS = ("scan", "chunked")


def wkv6(r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK, state=None, *, reset_BT=None, valid_BT=None, impl=None):
    """The recurrence of RWKV-6 for every head, from an incoming state to an outgoing one. No factor scales r or k.

    Args:
        r_BTHK, k_BTHK: receptance and key.
        w_BTHK: log decay per step, <= 0 (-inf forgets at once); or [H, K], the same for all tokens (RWKV-5). The model
            computes -exp(.) of what it learns.
        v_BTHV: values.
        u_HK: bonus of the current token.
        state: [B, H, K, V] before the first token; None is the empty past, zeros.
        reset_BT: True where a new document starts: the token sees nothing before itself.
        valid_BT: False where a token is padding: it leaves the state untouched, its y is 0 and takes no gradient (a
            reset there is ignored).
        impl: "scan", "chunked", or None for the one that suits `target_platform()` and T. A named form is never
            replaced.

    Returns:
        y_BTHV in the dtype of v, and the state [B, H, K, V] after the last token, in that of the accumulators:
        float32, or float64 if an argument is.

    Raises:
        ValueError: an unknown form, or a shape that does not fit.
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
    dtype = accumulator_dtype(r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK)
    state = jnp.zeros((B, H, K, V), dtype) if state is None else state.astype(dtype)
    if T == 0:
        return v_BTHV, state
    rule = RULES[impl or suited_form(target_platform(), T)]
    y_BTHV, state = recur(rule, (r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK), state, reset_BT, valid_BT)
    return y_BTHV.astype(v_BTHV.dtype), state


def suited_form(platform: str, T: int) -> str:
    """ "scan" for one token, else "chunked", on every platform: crossovers are not measured yet."""
    return "scan" if T == 1 else "chunked"


# ------------------------------------------------------------------------------------ scan over tokens


def _step(state, token):
    r, w, k, v, u = token
    y = (r[..., None] * state).sum(-2) + (r * u * k).sum(-1, keepdims=True) * v
    return jnp.exp(w)[..., None] * state + k[..., None] * v[..., None, :], y


def _step_grads(state, token, dstate, dy):
    r, w, k, v, u = token
    decay, vdy = jnp.exp(w), (v * dy).sum(-1, keepdims=True)
    dr = (state * dy[..., None, :]).sum(-1) + u * k * vdy
    dw = decay * (dstate * state).sum(-1)
    dk = (dstate * v[..., None, :]).sum(-1) + u * r * vdy
    dv = (dstate * k[..., None]).sum(-2) + (r * u * k).sum(-1, keepdims=True) * dy
    return decay[..., None] * dstate + r[..., None] * dy[..., None, :], (dr, dw, dk, dv, r * k * vdy)


# ------------------------------------------------------------------------------------ chunks of tokens


def _chunk_forward(state, operands, reset_BC):
    """Y = (R e^before) S + A V,   S <- e^whole S + (K e^after)^T V,   A = scores of r and k, u on the diagonal."""
    r, w, k, v, u = operands
    scores, decays = decayed_scores(r[..., None, :], k[..., None, :], w)
    scores = scores[:, :, 0, 0]
    from_past, to_end, past = r * jnp.exp(decays.before), k * jnp.exp(decays.after), jnp.exp(decays.whole).mT * state
    if reset_BC is not None:
        same, of_past, of_last = documents(reset_BC)
        scores = jnp.where(same[:, None], scores, 0)
        from_past = jnp.where(of_past[:, None, :, None], from_past, 0)
        to_end = jnp.where(of_last[:, None, :, None], to_end, 0)
        past = jnp.where(of_past[:, -1, None, None, None], past, 0)
    own = (r * u * k).sum(-1, keepdims=True) * v
    return past + matmul(to_end.mT, v), matmul(from_past, state) + matmul(scores, v) + own


RULES = {
    "scan": by_token(_step, _step_grads, 32),
    "chunked": by_chunk(_chunk_forward, 16),
}
