"""WKV of RWKV-7 (Goose, arXiv:2503.14456): a matrix of key-value pairs, in which a token can replace what it finds.

For each head, with receptance r, key k, log decay w <= 0 and the pair a, b in R^K, and value v in R^V,

    write   S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    read    y_t = S_t^T r_t

The token is written before it is read. RWKV-7 passes a = -kappa and b = kappa * alpha, kappa a key of length 1 and
alpha the in-context learning rate of each channel: alpha of the value found at kappa is removed. Nothing here needs
that form. With s_t = S_{t-1}^T a_t and dS = dL/dS_t, to which the read at t has added r_t dy_t^T, backward in time

    dr_t = exp(w_t) * S_{t-1} dy_t + b_t (s_t . dy_t) + k_t (v_t . dy_t)
    dw_t = exp(w_t) * sum_V dS * S_{t-1}        dk_t = dS v_t         dv_t = dS^T k_t
    da_t = S_{t-1} ds_t,  ds_t = dS^T b_t       db_t = dS s_t         dL/dS_{t-1} = diag(exp(w_t)) dS + a_t ds_t^T

There are two forms: `scan`, one token after the other, and `chunked`, products of matrices over 16 tokens, which is
the one that trains. There is none that scans over all prefixes at once, as `wkv4` has: the map of a prefix is a K x K
matrix, 57 times the arithmetic of the recurrence, and 32 KB a token and head of 64.
"""

import jax.numpy as jnp

from rwkv_jax.ops.chunks import by_chunk, by_token, decayed_scores, documents, inverse, matmul, recur
from rwkv_jax.ops.dispatch import accumulator_dtype, check_form, check_shapes, target_platform

FORMS = ("scan", "chunked")


def wkv7(r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state=None, *, reset_BT=None, valid_BT=None, impl=None):
    """The recurrence of RWKV-7 for every head, from an incoming state to an outgoing one. No factor scales r or k.

    Args:
        r_BTHK, k_BTHK: receptance and key.
        w_BTHK: log decay per step, <= 0 (-inf forgets at once); in RWKV-7 above -exp(-1/2) = -0.607.
        v_BTHV: values.
        a_BTHK, b_BTHK: where the old state is read, and where what was read is added.
        state: [B, H, K, V] before the first token; None is the empty past, zeros. The released code keeps [H, V, K].
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
    if r_BTHK.ndim != 4 or v_BTHV.ndim != 4:
        raise ValueError(f"r and v are {r_BTHK.shape} and {v_BTHV.shape}, expected [B, T, H, K] and [B, T, H, V]")
    (B, T, H, K), V = r_BTHK.shape, v_BTHV.shape[3]
    pairs = {"w": w_BTHK, "k": k_BTHK, "a": a_BTHK, "b": b_BTHK}
    check_shapes(
        **{name: (x, (B, T, H, K)) for name, x in pairs.items()},
        v=(v_BTHV, (B, T, H, V)),
        state=(state, (B, H, K, V)),
        reset_BT=(reset_BT, (B, T)),
        valid_BT=(valid_BT, (B, T)),
    )
    operands = (r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    dtype = accumulator_dtype(*operands)
    state = jnp.zeros((B, H, K, V), dtype) if state is None else state.astype(dtype)
    if T == 0:
        return v_BTHV, state
    y_BTHV, state = recur(RULES[impl or suited_form(target_platform(), T)], operands, state, reset_BT, valid_BT)
    return y_BTHV.astype(v_BTHV.dtype), state


def suited_form(platform: str, T: int) -> str:
    """ "scan" for one token, else "chunked", on every platform: crossovers are not measured yet."""
    return "scan" if T == 1 else "chunked"


# ------------------------------------------------------------------------------------ scan over tokens


def _step(state, token):
    r, w, k, v, a, b = token
    s = (a[..., None] * state).sum(-2)
    state = jnp.exp(w)[..., None] * state + b[..., None] * s[..., None, :] + k[..., None] * v[..., None, :]
    return state, (r[..., None] * state).sum(-2)


def _step_grads(state, token, dstate, dy):
    r, w, k, v, a, b = token
    decay, s = jnp.exp(w), (a[..., None] * state).sum(-2)
    dstate = dstate + r[..., None] * dy[..., None, :]
    dot = lambda x, y: (x * y).sum(-1, keepdims=True)
    dr = decay * (state * dy[..., None, :]).sum(-1) + b * dot(s, dy) + k * dot(v, dy)
    dw = decay * (dstate * state).sum(-1)
    dk, db = (dstate * v[..., None, :]).sum(-1), (dstate * s[..., None, :]).sum(-1)
    dv, ds = (dstate * k[..., None]).sum(-2), (dstate * b[..., None]).sum(-2)
    da = (state * ds[..., None, :]).sum(-1)
    return decay[..., None] * dstate + a[..., None] * ds[..., None, :], (dr, dw, dk, dv, da, db)


# ------------------------------------------------------------------------------------ chunks of tokens


def _chunk_forward(state, operands, reset_BC):
    """What the tokens of a chunk find at their a, s_t = S_{t-1}^T a_t, depends on what earlier ones found:

        SA = (A e^before) S + M_ab SA + M_ak V        =>    SA = (I - M_ab)^-1 ((A e^before) S + M_ak V)
        Y  = (R e^w e^before) S + M_rb SA + M_rk V
        S <- e^whole S + (B e^after)^T SA + (K e^after)^T V

    where M_xy are `decayed_scores`, strictly lower triangular for a; a token's own write counts for r.
    """
    r, w, k, v, a, b = operands
    C = r.shape[2]
    x, y = jnp.stack([a, r * jnp.exp(w)], axis=3), jnp.stack([b, k], axis=3)
    scores, decays = decayed_scores(x, y, w)
    own = jnp.where(jnp.eye(C, dtype=bool), (r[:, :, :, None] * y).sum(-1).swapaxes(2, 3)[..., None], 0)
    from_past = (x * jnp.exp(decays.before)[..., None, :]).swapaxes(2, 3)
    to_end = (y * jnp.exp(decays.after)[..., None, :]).swapaxes(2, 3)
    past = jnp.exp(decays.whole).mT * state
    if reset_BC is not None:
        same, of_past, of_last = documents(reset_BC)
        scores = jnp.where(same[:, None, None, None], scores, 0)
        from_past = jnp.where(of_past[:, None, None, :, None], from_past, 0)
        to_end = jnp.where(of_last[:, None, None, :, None], to_end, 0)
        past = jnp.where(of_past[:, -1, None, None, None], past, 0)
    (ab, ak), (rb, rk) = scores.transpose(2, 3, 0, 1, 4, 5)
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    found = matmul(flat(from_past), state) + matmul(jnp.concatenate([ak, rk + own[:, :, 1]], axis=2), v)
    sa = matmul(inverse(ab), found[:, :, :C])
    y_BHCV = found[:, :, C:] + matmul(rb + own[:, :, 0], sa)
    return past + matmul(flat(to_end).mT, jnp.concatenate([sa, v], axis=2)), y_BHCV


RULES = {
    "scan": by_token(_step, _step_grads, 32),
    "chunked": by_chunk(_chunk_forward, 16),
}
