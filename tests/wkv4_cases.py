"""Inputs of `ops.wkv4` that cover every regime at once: decays and bonuses by channel, log weights by row."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from wkv4_forms import budget, check_all, spread_and_largest
from wkv4_formula import formula, past_of

from rwkv_jax.ops import WKV4State

# Channels: decays from none to all at once. Rows: mild log weights, a large common offset, extremes, constant tokens.
LOG_DECAYS = (-1e-8, -1e-3, -0.1, -3.0, -1e4, -np.inf)
BONUSES = (-1.2, -0.7, -1.7, 20.0, -20.0, 0.3)
D = len(LOG_DECAYS)
OFFSETS = (0, 1000, 1e4, -3)
ROWS = len(OFFSETS)
EMPTY = -1e38

# Two calls of one shape, which is traced once. In the scan they are longer than a chunk of 32 tokens.
PIECES = {"scan": (35, 35), "associative": (10, 10), "pallas": (10, 10)}

# One letter a token, "." is padding, a capital starts a document.
PLAIN, PADDING = "abcdefghijklmnopqrst", "...................."
CUT = "abcdefghAbcdefghijkl"
LAYOUTS = (
    (PLAIN, "given"),
    (PLAIN, "empty"),
    ("..abcAb.cdefghiAbc.A", "scaled"),
    ("Abcdef.ghijAbA..bcd.", "given"),
    (PADDING, "given"),
    (PADDING, "empty"),
    (".................abc", "scaled"),
    (CUT, "given"),
)


class Case(NamedTuple):
    w: np.ndarray
    u: np.ndarray
    k: np.ndarray
    v: np.ndarray
    state: WKV4State
    dy: np.ndarray


@functools.cache
def case(T, dtype=np.float32) -> Case:
    """A row for each regime of log weights, all after a past."""
    rng = np.random.default_rng(T)
    shape = (T, D)
    noise = rng.standard_normal(shape)
    k = np.stack([2 * noise, 1000 + noise, rng.uniform(-1e4, 1e4, shape), np.full(shape, -3.0)])
    v = rng.standard_normal((ROWS, *shape))
    v[3] = v[3, :1]
    offset = np.array(OFFSETS)[:, None]
    state = (rng.standard_normal((ROWS, D)), rng.uniform(0.5, 2, (ROWS, D)), offset + rng.standard_normal((ROWS, D)))
    w, u, k, v, dy = (np.asarray(x, dtype) for x in (LOG_DECAYS, BONUSES, k, v, rng.standard_normal((ROWS, *shape))))
    return Case(w, u, k, v, WKV4State(*(x.astype(dtype) for x in state)), dy)


@functools.cache
def expected(T, dtype=np.float32):
    w, u, k, v, state, dy = case(T, dtype)
    return formula(w, u, k, v, past_of(state), dy)


def check_case(y, state, grads, T, dtype=np.float32):
    _, u, k, _, before, _ = case(T, dtype)
    allowed = budget(dtype, T, *spread_and_largest(u, k, before))
    check_all(y, state, grads, before, expected(T, dtype), allowed, allowed.max(), dtype)


def empty(rows) -> WKV4State:
    return WKV4State(*(np.full((rows, D), fill, np.float32) for fill in (0, 0, EMPTY)))


def packed_case(T, layouts=LAYOUTS):
    """(case, masks, allowed error [B, 1]): each regime in each layout, in float32. A reset on padding is ignored.

    Padding holds large numbers, which change nothing. The loss of a `CUT` row is on its last document alone.
    """
    few = case(T)
    times = len(layouts)
    repeated = lambda x: np.concatenate([x] * times)
    k, v, dy = (repeated(x) for x in (few.k, few.v, few.dy))
    kinds = np.repeat([kind for _, kind in layouts], ROWS)[:, None]
    num, den, log_scale = map(repeated, few.state)
    num, den = (np.where(kinds == "scaled", x * np.float32(np.exp(-5)), x) for x in (num, den))
    log_scale = np.where(kinds == "scaled", log_scale + np.float32(5), log_scale)
    fills = zip((num, den, log_scale), empty(1), strict=True)
    state = WKV4State(*(np.where(kinds == "empty", fill[0, 0], x) for x, fill in fills))
    allowed = budget(np.float32, T, *spread_and_largest(few.u, k, state))

    letters = np.repeat([list((layout * T)[:T]) for layout, _ in layouts], ROWS, axis=0)
    valid, reset = letters != ".", np.char.isupper(letters)
    k[~valid], v[~valid], dy[~valid] = 1e4, 1e6, 1e6
    cut = np.repeat([layout == CUT for layout, _ in layouts], ROWS)
    dy[cut, : max(np.flatnonzero(reset[cut].any(0)), default=0)] = 0
    return Case(few.w, few.u, k, v, state, dy), {"reset_BT": reset | ~valid, "valid_BT": valid}, allowed


def check_packed(y, after, grads, inputs, masks, allowed):
    """Compare what a form computed from `packed_case` with the formula. All padding leaves the state as it is."""
    w, u, k, v, before, dy = inputs
    valid = masks["valid_BT"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, after, grads)))
    want = formula(w, u, k, v, past_of(before), np.where(valid[..., None], dy, 0), **masks)
    check_all(np.where(valid[..., None], y, 0), after, grads, before, want, allowed, allowed.max())
    untouched = ~valid.any(1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[untouched], b[untouched]), after, before)
    alone = valid[:, 0] & (before.den == 0).all(1)
    np.testing.assert_array_equal(np.asarray(y)[alone, 0], v[alone, 0])
    assert untouched.any() and alone.any()
