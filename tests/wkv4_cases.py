"""Inputs of `ops.wkv4` that cover every regime at once, and the comparison with Eq. 16 within what rounding costs."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from operators import Sized, check, check_rounded
from wkv4_formula import formula, past_of

from rwkv_jax.ops import WKV4State
from rwkv_jax.ops.wkv4 import FORMS
from rwkv_jax.ops.wkv4_algebra import EMPTY

# The interpreter compiles for seconds: the fast suite runs a kernel in one test.
FORMS_AND_SLOWLY_PALLAS = [pytest.param(form, marks=pytest.mark.slow) if form == "pallas" else form for form in FORMS]

# Channels: decays from none to all at once. Rows: mild log weights, a large common offset, extremes, constant tokens.
LOG_DECAYS = (-1e-8, -1e-3, -0.1, -3.0, -1e4, -np.inf)
BONUSES = (-1.2, -0.7, -1.7, 20.0, -20.0, 0.3)
D = len(LOG_DECAYS)
OFFSETS = (0, 1000, 1e4, -3)
ROWS = len(OFFSETS)

# Two calls of one shape, which is traced once. In the scan they are longer than a chunk of 32 tokens.
PIECES = {"scan": (35, 35), "associative": (10, 10), "pallas": (10, 10)}


class Case(NamedTuple):
    operands: tuple  # w, u, k, v
    state: WKV4State
    dy: np.ndarray


@functools.cache
def case(T, dtype=np.float32) -> Case:
    """One row for each regime of log weights, all after a past."""
    rng = np.random.default_rng(T)
    shape = (T, D)
    noise = rng.standard_normal(shape)
    k = np.stack([2 * noise, 1000 + noise, rng.uniform(-1e4, 1e4, shape), np.full(shape, -3.0)])
    v = rng.standard_normal((ROWS, *shape))
    v[3] = v[3, :1]
    offset = np.array(OFFSETS)[:, None]
    state = (rng.standard_normal((ROWS, D)), rng.uniform(0.5, 2, (ROWS, D)), offset + rng.standard_normal((ROWS, D)))
    w, u, k, v, dy = (np.asarray(x, dtype) for x in (LOG_DECAYS, BONUSES, k, v, rng.standard_normal((ROWS, *shape))))
    return Case((w, u, k, v), WKV4State(*(x.astype(dtype) for x in state)), dy)


def empty(rows) -> WKV4State:
    return WKV4State(*(np.full((rows, D), fill, np.float32) for fill in (0, 0, EMPTY)))


def random_case(seed, T, B=32):
    """(case, masks) in float32 with rows of any regime, documents, padding and past; padding holds large numbers.

    Rows 0 and 1 are padding only; the loss of the last four depends on their last document alone.
    """
    rng = np.random.default_rng(seed)
    eighths = lambda most, *shape: np.float32(rng.integers(-8 * most, 8 * most + 1, shape) / 8)  # no weight underflows
    draw = lambda most, *shape: np.float32(rng.uniform(-most, most, shape))

    def pick(*choices):
        """One of the choices for each row."""
        return np.stack(np.broadcast_arrays(*choices))[rng.integers(len(choices), size=B), np.arange(B)]

    wide, mild = draw(1e4, B, T, D), draw(5, B, T, D)
    k = pick(wide, mild, mild + draw(1e4, B, 1, 1), wide[:, :1])
    v, dy = pick(eighths(1000, B, T, D), eighths(1000, B, 1, D)), eighths(10, B, T, D)
    w = -np.float32(10.0 ** rng.uniform(-8, 4, D))
    w[rng.integers(D)] = (0, -np.inf, -1e-8, -1e4)[seed % 4]

    mask = lambda: rng.random((B, T)) < rng.choice([0.1, 0.5, 0.9], (B, 1))
    reset, valid = pick(np.zeros((B, T), bool), np.True_, mask()), pick(np.ones((B, T), bool), mask())
    valid[:2] = False
    k[~valid], v[~valid], dy[~valid] = 1e4, 1e6, 1e6
    for b in range(B - 4, B):
        dy[b, : max(np.flatnonzero(reset[b] & valid[b]), default=0)] = 0

    den = np.float32(rng.uniform(0.5, 2, (B, D)))
    state = WKV4State(eighths(1000, B, D) * den, den, draw(1e4, B, D))
    empties = (np.arange(B) % 4 == 1)[:, None]
    state = WKV4State(*(np.where(empties, *x) for x in zip(empty(1), state, strict=True)))
    u = np.where(rng.random(D) < 0.3, draw(100, D), draw(2, D))
    return Case((w, u, k, v), state, dy), {"reset_BT": reset, "valid_BT": valid}


def budget(dtype, T, spread, largest):
    """Largest error of a result relative to its magnitude (see `operators.Sized`).

    A weight is a product of at most one exponential a token. Each costs about 2 eps: half for the product, half for
    the sum, 1 for the exponential itself. The exponents are differences, which are rounded relative to the spread
    of the log weights and not to their size, and add up to no more than that spread before a weight vanishes.
    16 covers the few operations per result. The formula's own log weights are rounded relative to the largest.
    """
    rounding = np.finfo(dtype).eps * (2 * T + spread + 16)
    return rounding + np.finfo(np.float64).eps * (T + largest)


def allowed_error(dtype, u_D, k_BTD, state):
    """`budget` of each row, [B, 1]."""
    past = np.maximum(past_of(state).log_weight, np.min(k_BTD))
    logs = np.concatenate([np.reshape(np.float64(x), (len(k_BTD), -1)) for x in (k_BTD, past)], axis=1)
    spread, largest = np.ptp(logs, axis=1) + np.abs(u_D).max(), np.abs(logs).max(axis=1)
    return budget(dtype, k_BTD.shape[1], spread, largest)[:, None]


def check_all(y, after, grads, before, want, allowed, summing=0.0, dtype=np.float32, terms=1.0):
    """Check outputs, final state and gradients ((w, u, k, v), state `before`) of sum(dy * y) against `formula`.

    `allowed` [B, 1] is for each row; the gradients of w and u, sums over rows and time, may err by `summing` more.
    """
    (dw, du, dk, dv), dstate = grads
    held = functools.partial(check, dtype=dtype, terms=terms)
    held(y, want["y"], allowed)
    check_state(after, want, allowed, dtype, terms)
    held(dw, want["w"].over_rows(allowed + summing), 1)
    held(du, want["u"].over_rows(allowed + summing), 1)
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


def check_state(after, want, *within):
    for actual, name in zip(past_of(after), ("mean", "log_weight"), strict=True):
        check(actual, want[name], *within)


def check_case(y, after, grads, inputs, dtype=np.float32):
    """Check a form's results on `case` against the formula."""
    (w, u, k, v), before, dy = inputs
    allowed = allowed_error(dtype, u, k, before)
    check_all(y, after, grads, before, formula(w, u, k, v, past_of(before), dy), allowed, dtype=dtype)


def check_random(y, after, grads, inputs, masks, steps):
    """Check a form's results on `random_case` against the formula, within the rounding of `steps` merges.

    An output lies between the values that its token has seen, the first token of a document is its own average, and a
    row of padding leaves the state unchanged.
    """
    (w, u, k, v), before, dy = inputs
    past, valid, eps = past_of(before), masks["valid_BT"], np.finfo(np.float32).eps
    y = np.where(valid[..., None], y, 0)  # outputs at padding are undefined
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, after, grads)))
    untouched = ~valid.any(1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[untouched], b[untouched]), after, before)

    first = valid & (np.cumsum(valid, axis=1) == 1)
    starts = valid & masks["reset_BT"] | first & (before.den == 0).all(1)[:, None]
    np.testing.assert_array_equal(y[starts], v[starts])
    low, high = np.empty(v.shape), np.empty(v.shape)
    least = largest = past.mean
    for t in range(v.shape[1]):
        begins, counts, now = starts[:, t, None], valid[:, t, None], v[:, t]
        low[:, t] = least = np.where(begins, now, np.where(counts, np.minimum(least, now), least))
        high[:, t] = largest = np.where(begins, now, np.where(counts, np.maximum(largest, now), largest))
    slack = eps * (2 * steps + 4) * np.maximum(abs(low), abs(high)) + np.finfo(np.float32).tiny
    outside = np.maximum(low - y, y - high) / slack
    assert outside[valid].max() <= 1, f"outside by {outside[valid].max():.3g} times what rounding explains"

    unseen = (starts & first).any(1)[:, None, None] | np.isinf(past.log_weight[:, None])
    logs = np.concatenate([past.log_weight[:, None], k], axis=1)
    seen = np.concatenate([~unseen, np.broadcast_to(valid[..., None], k.shape)], axis=1)
    spread = np.ma.array(logs, mask=~seen).ptp(axis=1).filled(0).max(-1, keepdims=True) + abs(u).max()
    allowed = eps * (2 * steps + 32 + spread)
    terms = k.shape[1] ** 2 * abs(dy[valid]).max() * max(abs(v[valid]).max(), abs(past.mean).max())
    want = formula(w, u, k, v, past, np.where(valid[..., None], dy, 0), **masks)
    check_all(y, after, grads, before, want, allowed, eps * valid.size, terms=terms)


def in_bfloat16(inputs) -> Case:
    """Tokens in bfloat16, and the cotangent of an output in it."""
    (w, u, k, v), state, dy = inputs
    narrow = lambda x: x.astype(jax.numpy.bfloat16)
    return Case((w, u, narrow(k), narrow(v)), state, narrow(dy).astype(np.float32))


def check_bfloat16(y, after, grads, inputs):
    """Check that y, dk and dv are rounded to bfloat16 once, at the end; all else is computed in float32 and stays in
    it."""
    (w, u, k, v), before, dy = inputs
    (dw, du, dk, dv), dstate = grads
    assert {x.dtype for x in (dw, du, *after, *dstate)} == {np.dtype("float32")}
    want = formula(w, u, k, v, past_of(before), dy)
    allowed = allowed_error(np.float32, u, np.float32(k), before)
    check_state(after, want, allowed)
    for actual, name in ((y, "y"), (dk, "k"), (dv, "v")):
        check_rounded(actual, want[name], allowed)
    check(dw, want["w"].over_rows(allowed), 1)
