"""WKV-4 under test: its inputs, and the forms and peers that run on them.

32 channels, 4 kinds of log weight times 8 decays, from an empty past; values and dy from N(0, 1). w and u are always
float32, as in a model.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.precision import peers
from experiments.precision.bounds import STEPS, bound
from rwkv_jax.ops import wkv4

LONGEST_SLOW = 1024  # tokens: beyond, the interpreted kernel and the loop in Python are skipped

LOG_DECAYS = (-1e-8, -1e-5, -1e-3, -1e-2, -0.1, -0.5, -2.0, -10.0)
constant = lambda x: np.broadcast_to(x[:1], x.shape)
KINDS = {
    "k ~ N(0, 1)": lambda k, v: (k, v),
    "k ~ 10 N(0, 1)": lambda k, v: (10 * k, v),
    "k ~ 1000 + N(0, 1)": lambda k, v: (1000 + k, v),
    "constant tokens": lambda k, v: (constant(k), constant(v)),
}
CHANNELS = [f"{kind}, w = {w:g}" for kind in KINDS for w in LOG_DECAYS]


def inputs(T, dtype):
    """Return (w_C, u_C float32, k_TC, v_TC, dy_TC of `dtype`)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    pairs = [kind(*normal(2, T, len(LOG_DECAYS))) for kind in KINDS.values()]
    k_TC, v_TC = (np.concatenate(x, axis=1) for x in zip(*pairs, strict=True))
    # -exp of a float32 parameter, as a model has it: transformers is given that parameter, log(-w) in float32
    w_C = -np.exp(np.tile(np.log(-np.array(LOG_DECAYS)), len(KINDS)).astype(np.float32))
    u_C, dy_TC = normal(len(CHANNELS)), normal(*k_TC.shape)
    return w_C, u_C, *(np.asarray(jnp.asarray(x, dtype)) for x in (k_TC, v_TC, dy_TC))


def sides(T, dtype):
    """Return the functions of `inputs` to measure at a length, by name."""
    forms = [form for form in STEPS if form != "pallas" or T <= LONGEST_SLOW]
    # one function object per form: `gradients` compiles once for each
    found = {form: partial(gradients, partial(_outputs, form)) for form in forms}
    found["plain scan"] = partial(gradients, peers.plain_scan)
    if T <= LONGEST_SLOW and dtype == "float32":
        found["transformers"] = peers.transformers_gradients
    return found


def allowed(form, name, w_C, u_C, k_TC, v_TC, dy_TC):
    """Return the bound of a form on the result `name` of each channel."""
    spread_C = np.ptp(np.asarray(k_TC, np.float64), axis=0) + abs(u_C)
    return bound(form, len(k_TC), spread_C, summed=name in ("w", "u"))


@partial(jax.jit, static_argnums=0)
def gradients(wkv, w_C, u_C, k_TC, v_TC, dy_TC):
    """Return `wkv`'s y and the gradients of sum(dy * y), by name."""
    y_BTC, transposed = jax.vjp(wkv, w_C, u_C, k_TC[None], v_TC[None])
    dw, du, dk_BTC, dv_BTC = transposed(dy_TC[None])
    return {"y": y_BTC[0], "w": dw, "u": du, "k": dk_BTC[0], "v": dv_BTC[0]}


def _outputs(form, w_C, u_C, k_BTC, v_BTC):
    return wkv4(w_C, u_C, k_BTC, v_BTC, impl=form)[0]
