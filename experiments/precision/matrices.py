"""WKV of RWKV-5, 6 and 7 under test: inputs, and the forms that run on them.

A head of 4 x 4 channels for every kind of token and decay; the incoming state and the cotangent of the outgoing one
are drawn from N(0, 1). The log decay of a channel is its head's times exp(N(0, 1)), drawn for each token, or once in
RWKV-5. "Large keys" are 1,000 times as large in one token of 100. "Repeated keys" are one key plus 5 % of noise.
RWKV-7's in-context rates are anything from 0 to 1 unless named. w, u and states are always float32, as in a model.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.precision.bounds import TOKENS, matrix_bound
from rwkv_jax.models.rwkv7 import STRONGEST
from rwkv_jax.ops import wkv6, wkv7

CHANNELS = 4  # of keys and of values
DECAYS6 = (-1e-8, -1e-5, -1e-3, -1e-2, -0.1, -0.5, -2.0, -10.0)
DECAYS7 = (-1e-8, -1e-5, -1e-3, -1e-2, -0.1, STRONGEST)
KINDS6 = ("N(0, 1)", "large keys", "constant tokens")
KINDS7 = (*KINDS6, "rate 0", "rates 0 or 1", "rate 1", "repeated keys")

_heads = lambda kinds, decays: [f"{kind}, w = {w:.3g}" for kind in kinds for w in decays]
HEADS6, HEADS7 = _heads(KINDS6, DECAYS6), _heads(KINDS7, DECAYS7)
_of_kind = lambda kind, names: np.array([name.startswith(kind) for name in names])


def inputs5(T, dtype):
    """Return `inputs6` with one decay for all tokens, w_KH."""
    r, w, *others = inputs6(T, dtype)
    return r, w[0], *others


def inputs6(T, dtype):
    """Return (r_TKH, w_TKH, k_TKH, v_TVH, u_KH, state_KVH, dy_TVH, dstate_KVH); r, k, v and dy have `dtype`."""
    normal, r, w, k, v, dy = _tokens(T, HEADS6, np.tile(DECAYS6, len(KINDS6)))
    state, dstate, u = normal(CHANNELS, *r.shape[1:]), normal(CHANNELS, *r.shape[1:]), normal(*r.shape[1:])
    r, k, v, dy = _rounded(dtype, r, k, v, dy)
    return r, w, k, v, u, state, dy, dstate


def inputs7(T, dtype):
    """Return (r_TKH, w_TKH, k_TKH, v_TVH, a_TKH, b_TKH, state_KVH, dy_TVH, dstate_KVH); w and states are float32."""
    normal, r, w, k, v, dy = _tokens(T, HEADS7, np.tile(DECAYS7, len(KINDS7)))
    key, rate = normal(*r.shape), np.abs(np.sin(normal(*r.shape)))
    of = partial(_of_kind, names=HEADS7)
    key[..., of("repeated")] = key[:1, :, of("repeated")] + 0.05 * key[..., of("repeated")]
    rate[..., of("repeated")], rate[..., of("rate 0")], rate[..., of("rate 1")] = 0.999, 0, 1
    rate[..., of("rates")] = rate[..., of("rates")] > 0.5
    for x in (key, rate):
        x[..., of("constant")] = x[:1, :, of("constant")]
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    state, dstate = normal(CHANNELS, *r.shape[1:]), normal(CHANNELS, *r.shape[1:])
    r, k, v, a, b, dy = _rounded(dtype, r, k, v, -key, key * rate, dy)
    return r, np.maximum(w, np.float32(STRONGEST)), k, v, a, b, state, dy, dstate


def _tokens(T, names, decays):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    r, w, k, v, dy = (normal(T, CHANNELS, len(names)) for _ in range(5))
    w = np.float32(decays) * np.exp(w)
    k[::100, :, _of_kind("large keys", names)] *= 1000
    for x in (w, k, v):
        x[..., _of_kind("constant", names)] = x[:1, :, _of_kind("constant", names)]
    return normal, r, w, k, v, dy


def _rounded(dtype, *arrays):
    return [np.asarray(jnp.asarray(x, dtype)) for x in arrays]


def sides(op, names, T, dtype):
    """Return the functions of the inputs to measure, by name; `names` are those of the operands."""
    return {form: partial(results, op, form, names) for form in TOKENS}


sides6 = partial(sides, wkv6, "rwkvu")
sides7 = partial(sides, wkv7, "rwkvab")


@partial(jax.jit, static_argnums=(0, 1, 2))
def results(op, form, names, *given):
    """Return y, the final state, and the gradients of sum(dy y) + sum(dstate final), by name, heads last."""
    *operands, state, dy, dstate = given
    (y, final), transposed = jax.vjp(partial(_heads_last, op, form), *operands, state)
    return {"y": y, "final": final} | dict(zip((*names, "state"), transposed((dy, dstate)), strict=True))


def _heads_last(op, form, *operands_and_state):
    *operands, state_KVH = operands_and_state
    operands = (x.swapaxes(-1, -2) for x in operands)
    state_BHKV = jnp.moveaxis(state_KVH, -1, 0)[None]
    y_BTHV, final_BHKV = op(*(x[None] if x.ndim == 3 else x for x in operands), state_BHKV, impl=form)
    return y_BTHV[0].swapaxes(-1, -2), jnp.moveaxis(final_BHKV[0], 0, -1)


def allowed(form, name, *given):
    """Return the bound of a form on the result `name` of each head; `given` are the inputs."""
    T, size = len(given[0]), abs(given[1])
    slowest_H, strongest_H = (size if size.ndim == 2 else size.mean(0)).min(0), size.max(tuple(range(size.ndim - 1)))
    summed = name == "u" or (name == "w" and size.ndim == 2)
    return matrix_bound(form, T, slowest_H, strongest_H, summed)
