"""Every form of `ops.wkv4` against Eq. 16 written out in float64 (`wkv4_formula`): lengths, dtypes, no past.

Rows with documents and padding are in test_wkv4_properties.py.
"""

import functools

import jax
import numpy as np
import pytest
from operators import check, run
from wkv4_cases import (
    FORMS_AND_SLOWLY_PALLAS,
    ROWS,
    Case,
    D,
    allowed_error,
    case,
    check_bfloat16,
    check_case,
    check_state,
    empty,
    in_bfloat16,
)
from wkv4_formula import formula, past_of

from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.ops.wkv4 import FORMS


# Whole chunks of the scan, then less than one.
@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_wkv4_without_masks_or_state_follows_eq_16(form):
    T = {"scan": 64, "associative": 20, "pallas": 32}[form]
    operands, _, dy = case(T)
    y, after, (grads, of_nothing) = run(wkv4, form, (T,), operands, None, dy)
    assert of_nothing is None
    zeros = WKV4State(*np.zeros((3, ROWS, D), np.float32))
    check_case(y, after, (grads, zeros), Case(operands, empty(ROWS), dy))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 128, 1000])
def test_wkv4_follows_eq_16_at_any_length(form, T):
    following = 3  # tokens of a second call: the gradient reaches the state of the first through them
    inputs = case(T + following)
    check_case(*run(wkv4, form, (T, following), *inputs), inputs)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_wkv4_state_carries_across_splits(form):
    (w, u, k, v), state, dy = case(40)
    step = jax.jit(functools.partial(wkv4, impl=form))
    ys, after = [], state
    for t in range(40):
        y, after = step(w, u, k[:, t : t + 1], v[:, t : t + 1], after)
        ys.append(y)
    allowed, want = allowed_error(np.float32, u, k, state), formula(w, u, k, v, past_of(state), dy)
    check(np.concatenate(ys, axis=1), want["y"], allowed)
    check_state(after, want, allowed)


def test_wkv4_without_tokens_leaves_the_state_unchanged():
    (w, u, k, v), state, _ = case(20)
    y, after = wkv4(w, u, k[:, :0], v[:, :0], state)
    assert y.shape == (ROWS, 0, D)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_wkv4_computes_float64_in_float64(x64, form):
    inputs = case(20, np.float64)
    found = run(wkv4, form, (17, 3), *inputs)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float64")}
    check_case(*found, inputs, np.float64)


@pytest.mark.parametrize("form", ["scan", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_wkv4_accumulates_bfloat16_in_float32(form):
    inputs = in_bfloat16(case(20))
    check_bfloat16(*run(wkv4, form, (17, 3), *inputs), inputs)
