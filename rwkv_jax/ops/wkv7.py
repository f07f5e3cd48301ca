"""WKV of RWKV-7 (Goose, arXiv:2503.14456): a matrix of key-value pairs, in which a token can replace a value.

For each head, with receptance r, key k, log decay w <= 0 and the pair a, b in R^K, and value v in R^V,

    write   S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
    read    y_t = S_t^T r_t

The token is written before it is read. RWKV-7 passes a = -kappa and b = kappa * alpha, kappa a key of length 1 and
alpha, from 0 to 1, the in-context learning rate of each channel: the share of the value found at kappa that is
removed. The operator accepts any a and b.

With s_t = S_{t-1}^T a_t and dS = dL/dS_t, to which the read at t has added r_t dy_t^T, backward in time

    dr_t = exp(w_t) * S_{t-1} dy_t + b_t (s_t . dy_t) + k_t (v_t . dy_t)
    dw_t = exp(w_t) * sum_V dS * S_{t-1}        dk_t = dS v_t         dv_t = dS^T k_t
    da_t = S_{t-1} ds_t,  ds_t = dS^T b_t       db_t = dS s_t         dL/dS_{t-1} = diag(exp(w_t)) dS + a_t ds_t^T

There are two forms: `scan`, token by token, and `chunked`, matrix products over 16 tokens, which training uses.
There is no associative form as in `wkv4`: the map of a prefix is a K x K matrix, which takes 57 times the arithmetic
of the recurrence, and 32 KB a token and head of 64.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rwkv_jax.ops.chunks import Factors, Rule, by_token, einsum, factors, inverse, matmul, recur
from rwkv_jax.ops.dispatch import accumulator_dtype, check_form, check_shapes, target_platform

FORMS = ("scan", "chunked")


def wkv7(r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state=None, *, reset_BT=None, valid_BT=None, impl=None):
    """The recurrence of RWKV-7 for every head, from an incoming state to an outgoing one. No factor scales r or k.

    Args:
        r_BTHK, k_BTHK: receptance and key.
        w_BTHK: log decay per step, <= 0 (-inf forgets at once); in RWKV-7 above -exp(-1/2) = -0.607.
        v_BTHV: values.
        a_BTHK, b_BTHK: keys at which the old state is read, and at which the value read is added.
        state: [B, H, K, V] before the first token; None is the empty past, zeros. The released code keeps [H, V, K].
        reset_BT: True where a new document starts: the token sees nothing before itself.
        valid_BT: False where a token is padding: it leaves the state untouched, its y is 0 and gets no gradient, and a
            reset there is ignored.
        impl: "scan", "chunked", or None for the fastest on `target_platform()`, with gradients or without. A named
            form is never replaced.

    Returns:
        y_BTHV in the dtype of v, and the state [B, H, K, V] after the last token, in the accumulators' dtype:
        float32, or float64 if one of r, w, k, v, a, b is.

    Raises:
        ValueError: an unknown form, or a mismatched shape.
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
    plain, trained = (impl, impl) if impl else suited_forms(target_platform(), T)
    y_BTHV, state = recur(RULES[plain], RULES[trained], operands, state, reset_BT, valid_BT)
    return y_BTHV.astype(v_BTHV.dtype), state


def suited_forms(platform: str, T: int) -> tuple[str, str]:
    """The fastest forms for the forward pass alone, and with gradients.

    Milliseconds of the scan / of chunks on 2 CPU cores, 12 (B 1) and 8 (B 4) heads of 64:

        forward       B 1: T 1  0.03 / 0.06   T 256  4.5 / 9.5       B 4: T 1,024  59 / 93
        gradients     B 1: T 1  0.3 / 0.5     T 16  5.0 / 2.1        B 4: T 1,024  575 / 318

    Not measured elsewhere: a scan over tokens leaves an accelerator idle.
    """
    return "scan" if T == 1 or platform == "cpu" else "chunked", "scan" if T == 1 else "chunked"


# ------------------------------------------------------------------------------------ scan over tokens


def _step(state, token):
    r, w, k, v, a, b = token
    s = einsum("bhk,bhkv->bhv", a, state)
    state = jnp.exp(w)[..., None] * state + b[..., None] * s[..., None, :] + k[..., None] * v[..., None, :]
    return state, einsum("bhk,bhkv->bhv", r, state)


def _step_grads(state, token, dstate, dy):
    r, w, k, v, a, b = token
    decay, s = jnp.exp(w), einsum("bhk,bhkv->bhv", a, state)
    dstate = dstate + r[..., None] * dy[..., None, :]
    dot = lambda x, y: (x * y).sum(-1, keepdims=True)
    by_key, by_value = partial(einsum, "bhkv,bhv->bhk"), partial(einsum, "bhkv,bhk->bhv")
    dr = decay * by_key(state, dy) + b * dot(s, dy) + k * dot(v, dy)
    dw = decay * (dstate * state).sum(-1)
    dk, db = by_key(dstate, v), by_key(dstate, s)
    dv, ds = by_value(dstate, k), by_value(dstate, b)
    da = by_key(state, ds)
    return decay[..., None] * dstate + a[..., None] * ds[..., None, :], (dr, dw, dk, dv, da, db)


# ------------------------------------------------------------------------------------ chunks of tokens


def _factors(r, w, k, a, b, reset_BC):
    """Factors of reads a, r and writes b, k; r also sees its own token, and older ones with that token's decay."""
    own = jnp.stack([(r * b).sum(-1), (r * k).sum(-1)], axis=-1)
    own = jnp.stack([jnp.zeros_like(own), own], axis=-2)
    return factors((a, r * jnp.exp(w)), (b, k), w, own, reset_BC)


def _chunk_forward(state, operands, reset_BC):
    """Y and the state after the chunk. The value that a token reads at its a, row s_t = S_{t-1}^T a_t of SA, depends
    on earlier rows. With M_xy the scores of reads x and writes y, strictly lower triangular for a:

        SA = past_a S + M_ab SA + M_ak V        =>    SA = X (past_a S + M_ak V),   X = (I - M_ab)^-1
        Y  = past_r S + M_rb SA + M_rk V
        S <- whole S + end_b^T SA + end_k^T V
    """
    r, w, k, v, a, b = operands
    C = r.shape[2]
    whole, past, end, m = _factors(r, w, k, a, b, reset_BC)
    found = matmul(past, state) + matmul(m[:, :, :, C:], v)
    x = inverse(m[:, :, :C, :C])
    sa = matmul(x, found[:, :, :C])
    y = found[:, :, C:] + matmul(m[:, :, C:, :C], sa)
    state = whole.mT * state + matmul(end.mT, jnp.concatenate([sa, v], axis=2))
    return state, y, (m, x, sa)


def _chunk_backward(state, operands, reset_BC, kept, dstate, dy):
    """Gradients of a chunk. With F = [past_a; past_r] S + [M_ak; M_rk] V, dL/dM_ab = dF_a SA^T since SA = X F_a."""
    r, w, k, v, a, b = operands
    m, x, sa = kept
    C = r.shape[2]
    (whole, past, end, _), factors_vjp = jax.vjp(lambda *z: _factors(*z, reset_BC), r, w, k, a, b)
    values = jnp.concatenate([sa, v], axis=2)
    dvalues = matmul(end, dstate) + matmul(m[:, :, C:].mT, dy)
    dfound_a = matmul(x.mT, dvalues[:, :, :C])
    dv = dvalues[:, :, C:] + matmul(m[:, :, :C, C:].mT, dfound_a)
    dfound = jnp.concatenate([dfound_a, dy], axis=2)
    dwhole = (state * dstate).sum(-1)[:, :, None]
    dfactors = Factors(dwhole, matmul(dfound, state.mT), matmul(values, dstate.mT), matmul(dfound, values.mT))
    dr, dw, dk, da, db = factors_vjp(dfactors)
    return whole.mT * dstate + matmul(past.mT, dfound), (dr, dw, dk, dv, da, db)


RULES = {
    "scan": by_token(_step, _step_grads, 32),
    "chunked": Rule(_chunk_forward, _chunk_backward, 16),
}
