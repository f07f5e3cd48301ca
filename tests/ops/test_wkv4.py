"""Every form of `ops.wkv4` against Eq. 16 written out in float64 (`wkv4_formula`)."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from wkv4_cases import PIECES, ROWS, D, case, check_case, check_packed, empty, expected, packed_case
from wkv4_forms import (
    FORMS,
    FORMS_AND_SLOWLY_PALLAS,
    SCAN_AND_SLOWLY_OTHERS,
    budget,
    check,
    check_all,
    run,
    spread_and_largest,
)
from wkv4_formula import Past, Sized, formula, past_of

from rwkv_jax.ops import wkv4


@functools.partial(jax.jit, static_argnums=0)
def forward(form, w, u, k, v, state, masks=None):
    return wkv4(w, u, k, v, state, impl=form, **(masks or {}))


@pytest.mark.parametrize("form", FORMS)
def test_wkv4_follows_eq_16_in_packed_and_padded_rows(form):
    """Outputs, final state and gradients, the state carried between two calls, in every regime."""
    inputs, masks, allowed = packed_case(sum(PIECES[form]))
    check_packed(*run(form, PIECES[form], *inputs, masks), inputs, masks, allowed)


def test_formula_of_packed_rows_is_that_of_each_document_alone():
    """The reference's own masks, against rows that are cut into documents."""
    (w, u, k, v, state, dy), masks, _ = packed_case(20)
    past, dy = past_of(state), np.where(masks["valid_BT"][..., None], dy, 0)
    packed = formula(w, u, k, v, past, dy, **masks)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-10)
    nothing = Past(np.zeros((1, D)), np.full((1, D), -np.inf))
    for b, (reset, valid) in enumerate(zip(*masks.values(), strict=True)):
        got, last, sums = {name: x.value[b] for name, x in packed.items()}, [x[b] for x in past], np.zeros((2, D))
        tokens = np.flatnonzero(valid)
        for document in np.split(tokens, np.flatnonzero(reset[tokens])):
            if len(document) == 0:
                continue
            continues = document[0] == tokens[0] and not reset[document[0]]
            row = Past(*(x[b : b + 1] for x in past)) if continues else nothing
            alone = formula(w, u, *(x[b : b + 1, document] for x in (k, v)), row, dy[b : b + 1, document])
            alone = {name: x.value[0] for name, x in alone.items()}
            for name in ("y", "k", "v"):
                close(got[name][document], alone[name])
            for name in ("past_mean", "past_log_weight") if continues else ():
                close(got[name], alone[name])
            last, sums = [alone["mean"], alone["log_weight"]], sums + np.stack([alone["w"], alone["u"]])
        close([got["mean"], got["log_weight"]], last)
        close([got["w"], got["u"]], sums)
        assert not any(got[name][~valid].any() for name in ("y", "k", "v"))


# Whole chunks of the scan, then less than one.
@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_wkv4_without_masks_or_state_follows_eq_16(form):
    T = {"scan": 64, "associative": 20, "pallas": 32}[form]
    w, u, k, v, _, dy = case(T)
    y, after, grads = run(form, (T,), w, u, k, v, None, dy)
    before = empty(ROWS)
    assert grads[4] is None
    allowed = budget(np.float32, T, *spread_and_largest(u, k, before))
    zeros = type(before)(*(np.zeros_like(x) for x in before))
    check_all(y, after, (*grads[:4], zeros), before, formula(w, u, k, v, past_of(before), dy), allowed, allowed.max())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 128, 1000])
def test_wkv4_follows_eq_16_at_any_length(form, T):
    following = 3  # tokens of a second call, through which the gradient reaches the state of the first
    check_case(*run(form, (T, following), *case(T + following)), T + following)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
@pytest.mark.parametrize("lengths", [(1,) * 40, pytest.param((7, 33), marks=pytest.mark.slow)], ids=len)
def test_wkv4_state_carries_across_splits(form, lengths):
    w, u, k, v, state, _ = case(40)
    ys, begin, after = [], 0, state
    for length in lengths:
        y, after = forward(form, w, u, k[:, begin : begin + length], v[:, begin : begin + length], after)
        ys.append(y)
        begin += length
    allowed, want = budget(np.float32, 40, *spread_and_largest(u, k, state)), expected(40)
    check(np.concatenate(ys, axis=1), want["y"], allowed)
    check(past_of(after).mean, want["mean"], allowed)
    check(past_of(after).log_weight, want["log_weight"], allowed)


def test_wkv4_without_tokens_leaves_the_state_unchanged():
    w, u, k, v, state, _ = case(40)
    y, after = wkv4(w, u, k[:, :0], v[:, :0], state)
    assert y.shape == (ROWS, 0, D)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_wkv4_computes_float64_in_float64(x64, form):
    y, state, grads = run(form, (17, 3), *case(20, np.float64))
    assert {x.dtype for x in jax.tree.leaves((y, state, grads))} == {np.dtype("float64")}
    check_case(y, state, grads, 20, np.float64)


@pytest.mark.parametrize("form", SCAN_AND_SLOWLY_OTHERS)
def test_wkv4_accumulates_bfloat16_in_float32(form):
    w, u, k, v, state, dy = case(20)
    k, v = k.astype(ml_dtypes.bfloat16), v.astype(ml_dtypes.bfloat16)
    dy = dy.astype(ml_dtypes.bfloat16).astype(np.float32)  # the cotangent of a bfloat16 output
    y, after, (dw, du, dk, dv, dstate) = run(form, (17, 3), w, u, k, v, state, dy)
    assert {y.dtype, dk.dtype, dv.dtype} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in (dw, du, *after, *dstate)} == {jnp.dtype("float32")}

    want = formula(w, u, k, v, past_of(state), dy)
    allowed = budget(np.float32, 20, *spread_and_largest(u, np.float32(k), state))
    check(past_of(after).mean, want["mean"], allowed)
    check(past_of(after).log_weight, want["log_weight"], allowed)
    # y, dk and dv are rounded to bfloat16 once, at the end: half a unit in the last place
    for actual, name in ((y, "y"), (dk, "k"), (dv, "v")):
        error = np.abs(np.float64(actual) - want[name].value)
        before_rounding = allowed[..., None] * want[name].magnitude + np.finfo(np.float32).tiny
        half = jnp.finfo(jnp.bfloat16).eps / 2 * np.abs(want[name].value)
        assert (error <= half + (1 + 2**-7) * before_rounding).all(), name
    check(dw, Sized(want["w"].value.sum(0), want["w"].magnitude.sum(0)), allowed.max())


@pytest.mark.parametrize("form", SCAN_AND_SLOWLY_OTHERS)
def test_wkv4_is_unchanged_by_vmap_and_remat(form):
    w, u, k, v, state, dy = case(20)

    @jax.checkpoint
    def row(k_TD, v_TD, state):
        y_BTD, after = wkv4(w, u, k_TD[None], v_TD[None], jax.tree.map(lambda x: x[None], state), impl=form)
        return y_BTD[0], jax.tree.map(lambda x: x[0], after)

    def loss(k_TD, v_TD, state, dy_TD):
        y_TD, after = row(k_TD, v_TD, state)
        return (y_TD * dy_TD).sum(), (y_TD, after)

    (dk, dv, dstate), (y, after) = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)))(k, v, state, dy)
    want = expected(20)
    sums = [Sized(x.value.sum(0), x.magnitude.sum(0)) for x in (want["w"], want["u"])]
    check_case(y, after, (*(x.value for x in sums), dk, dv, dstate), 20)
