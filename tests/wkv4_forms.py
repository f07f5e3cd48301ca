"""`ops.wkv4` run forward and backward, and compared with Eq. 16 (`wkv4_formula`) within what rounding costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wkv4_formula import Sized, past_of

from rwkv_jax.ops import wkv4

FORMS = ("scan", "associative", "pallas")
# The interpreter compiles for seconds: the fast suite runs a kernel in one test.
FORMS_AND_SLOWLY_PALLAS = (*FORMS[:2], pytest.param("pallas", marks=pytest.mark.slow))
SCAN_AND_SLOWLY_OTHERS = ("scan", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:]))


def budget(dtype, T, spread, largest):
    """Largest error of a result relative to its magnitude (see `wkv4_formula`).

    A weight is a product of at most one exponential a token. Each costs about 2 eps: half for the product, half for
    the sum, 1 for the exponential itself. The exponents are differences, which are rounded relative to the spread
    of the log weights and not to their size, and add up to no more than that spread before a weight vanishes.
    16 covers the few operations per result. The formula's own log weights are rounded relative to the largest.
    """
    rounding = np.finfo(dtype).eps * (2 * T + spread + 16)
    return rounding + np.finfo(np.float64).eps * (T + largest)


def spread_and_largest(u_D, k_BTD, state):
    """[B, 1] each: how far apart and how large the log weights of a row are."""
    log_weight_BD = past_of(state).log_weight
    logs = [np.reshape(np.float64(x), (len(k_BTD), -1)) for x in (k_BTD, np.maximum(log_weight_BD, k_BTD.min()))]
    logs = np.concatenate(logs, axis=1)
    spread = np.ptp(logs, axis=1) + np.abs(u_D).max()
    return spread[:, None], np.abs(logs).max(axis=1)[:, None]


def check(actual, expected: Sized, allowed, dtype=np.float32, terms=1.0):
    """|actual - expected| <= allowed * magnitude for every element; weights that underflow count for nothing.

    Where the magnitude is 0, as of a gradient across a reset or of padding, the result is 0.

    `terms`: size of the sum that such a weight is a factor of.
    """
    actual, (value, magnitude) = np.asarray(actual, np.float64), expected
    assert actual.shape == value.shape
    finite = np.isfinite(value)  # the log weight of an empty past is not
    np.testing.assert_array_equal(actual[~finite], value[~finite])
    allowed = np.broadcast_to(np.reshape(allowed, (-1, *[1] * (actual.ndim - 1))), actual.shape)
    actual, value, magnitude, allowed = (x[finite] for x in (actual, value, magnitude, allowed))
    assert np.isfinite(actual).all() and not actual[magnitude == 0].any()
    floor = terms * np.finfo(dtype).tiny / np.finfo(dtype).eps
    error = np.abs(actual - value) / (magnitude + floor)
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


def check_all(y, state, grads, before, want, allowed, allowed_of_sums, dtype=np.float32, terms=1.0):
    """Outputs, final state and gradients (w, u, k, v, state `before`) of sum(dy * y) against `formula`.

    `allowed` [B, 1] is for the rows, `allowed_of_sums` for w and u.
    """
    past = past_of(state)
    held = functools.partial(check, dtype=dtype, terms=terms)
    held(y, want["y"], allowed)
    held(past.mean, want["mean"], allowed)
    held(past.log_weight, want["log_weight"], allowed)
    dw, du, dk, dv, dstate = grads
    over_rows = lambda x: Sized(x.value.sum(0), x.magnitude.sum(0))
    held(dw, over_rows(want["w"]), allowed_of_sums)
    held(du, over_rows(want["u"]), allowed_of_sums)
    held(dk, want["k"], allowed)
    held(dv, want["v"], allowed)
    # the past's mean is num / den and its log weight log(den) + log_scale; the empty past has no gradient
    num, den, _ = (np.float64(x) for x in before)
    scale = np.where(den == 0, 0, 1 / np.where(den == 0, 1, den))
    mean, log = want["past_mean"], want["past_log_weight"]
    held(dstate.num, Sized(mean.value * scale, mean.magnitude * scale), allowed)
    value = (log.value - mean.value * num * scale) * scale
    magnitude = (log.magnitude + mean.magnitude * abs(num * scale)) * scale
    held(dstate.den, Sized(value, magnitude), allowed)
    magnitude = log.magnitude + 2 * mean.magnitude * abs(num * scale)
    held(dstate.log_scale, Sized(log.value, magnitude), allowed)


def in_pieces(form, lengths, w, u, k, v, state, **masks):
    """Outputs and final state with the state carried from call to call."""
    out, begin = [], 0
    for length in lengths:
        piece = slice(begin, begin + length)
        cut = {name: mask[:, piece] for name, mask in masks.items()}
        y, state = wkv4(w, u, k[:, piece], v[:, piece], state, impl=form, **cut)
        out.append(y)
        begin += length
    return jnp.concatenate(out, axis=1), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(form, lengths, w, u, k, v, state, dy, masks=None):
    """(outputs, final state, gradients of w, u, k, v and state)."""

    def loss(w, u, k, v, state):
        y, state = in_pieces(form, lengths, w, u, k, v, state, **(masks or {}))
        return (y.astype(dy.dtype) * dy).sum(), (y, state)

    grads, (y, state) = jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(w, u, k, v, state)
    return y, state, grads
