"""Every form of `ops.wkv4` against Eq. 16 written out in float64 (`wkv4_formula`)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wkv4_forms import FORMS, FORMS_AND_SLOWLY_PALLAS, budget, check, check_all, run, spread_and_largest
from wkv4_formula import Past, Sized, formula, past_of

from rwkv_jax.ops import WKV4State, wkv4

FOLLOWING = 3  # tokens of a second call, through which the state of the first is judged

# Channels: decays from none to all at once. Rows: mild log weights, a large common offset, extremes, constant tokens.
LOG_DECAYS = (-1e-8, -1e-3, -0.1, -3.0, -1e4, -np.inf)
BONUSES = (-1.2, -0.7, -1.7, 20.0, -20.0, 0.3)
ROWS = 4


@functools.cache
def case(T, dtype=np.float32):
    """(w_D, u_D, k_BTD, v_BTD, state, dy_BTD), rows x channels covering every regime at once."""
    rng = np.random.default_rng(T)
    D, shape = len(LOG_DECAYS), (T, len(LOG_DECAYS))
    noise = rng.standard_normal(shape)
    k = np.stack([2 * noise, 1000 + noise, rng.uniform(-1e4, 1e4, shape), np.full(shape, -3.0)])
    v = rng.standard_normal((ROWS, *shape))
    v[3] = v[3, :1]
    offset = np.array([0, 1000, 1e4, -3])[:, None]
    state = (rng.standard_normal((ROWS, D)), rng.uniform(0.5, 2, (ROWS, D)), offset + rng.standard_normal((ROWS, D)))
    w, u, k, v, dy = (np.asarray(x, dtype) for x in (LOG_DECAYS, BONUSES, k, v, rng.standard_normal((ROWS, *shape))))
    return w, u, k, v, WKV4State(*(x.astype(dtype) for x in state)), dy


@functools.cache
def expected(T, dtype=np.float32):
    w, u, k, v, state, dy = case(T, dtype)
    return formula(w, u, k, v, past_of(state), dy)


def check_case(y, state, grads, T, dtype=np.float32):
    _, u, k, _, before, _ = case(T, dtype)
    allowed = budget(dtype, T, *spread_and_largest(u, k, before))
    check_all(y, state, grads, before, expected(T, dtype), allowed, allowed.max(), dtype)


@pytest.mark.parametrize(
    ("form", "T"),
    [
        *itertools.product(FORMS[:2], (1, 2, 17, 128, 1000)),
        ("pallas", 17),
        *(pytest.param("pallas", T, marks=pytest.mark.slow) for T in (1, 2, 128, 1000)),
        (None, 1),
        (None, 17),
    ],
)
def test_follows_eq_16(form, T):
    check_case(*run(form, (T, FOLLOWING), *case(T + FOLLOWING)), T + FOLLOWING)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_float64_is_computed_in_float64(x64, form):
    y, state, grads = run(form, (17, 3), *case(20, np.float64))
    assert {x.dtype for x in jax.tree.leaves((y, state, grads))} == {np.dtype("float64")}
    check_case(y, state, grads, 20, np.float64)


# longer and shorter than the chunks of 32 tokens that the scan works in
@pytest.mark.parametrize("lengths", [(7, 33), (33, 7), (1,) * 40], ids=len)
@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_the_state_carries_everything_across_any_split(form, lengths):
    w, u, k, v, state, _ = case(40)
    step = jax.jit(functools.partial(wkv4, impl=form))
    ys, begin = [], 0
    after = state
    for length in lengths:
        y, after = step(w, u, k[:, begin : begin + length], v[:, begin : begin + length], after)
        ys.append(y)
        begin += length
    allowed, want = budget(np.float32, 40, *spread_and_largest(u, k, state)), expected(40)
    check(np.concatenate(ys, axis=1), want["y"], allowed)
    check(past_of(after).mean, want["mean"], allowed)
    check(past_of(after).log_weight, want["log_weight"], allowed)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_bfloat16_inputs_are_accumulated_in_float32(form):
    w, u, k, v, state, dy = case(20)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in (k, v))
    dy = dy.astype(jnp.bfloat16).astype(np.float32)  # the cotangent of a bfloat16 output
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


# ------------------------------------------------------------------------------- documents and padding

# one letter a token, "." is padding, a capital starts a document; calls of 13 and 3 tokens
LAYOUTS = ("..abcAb.cdefghiA", "Abcdef.ghijAbA..", "abcdefghijklmnop", ".............abc")


def masks_of(layouts):
    letters = np.array([list(row) for row in layouts])
    valid_BT = letters != "."
    reset_BT = np.char.isupper(letters)
    return {"reset_BT": reset_BT | ~valid_BT, "valid_BT": valid_BT}  # a reset on padding is ignored


def documents(layout):
    """(positions of the tokens, whether the incoming past is theirs) of each document of a row."""
    found = []
    for t, letter in enumerate(layout):
        if letter.isupper() or (letter.islower() and not found):
            found.append(([], letter.islower()))
        if letter != ".":
            found[-1][0].append(t)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_separate_ones_and_padding_changes_nothing(form):
    w, u, k, v, state, dy = (jax.tree.map(np.copy, x) for x in case(16))
    allowed_B1 = budget(np.float32, 16, *spread_and_largest(u, k, state))
    masks = masks_of(LAYOUTS)
    padding_BT = ~masks["valid_BT"]
    k[padding_BT], v[padding_BT], dy[padding_BT] = 1e4, 1e6, 1e6
    y, after, grads = run(form, (13, 3), w, u, k, v, state, dy, masks)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, after, grads)))

    past, nothing = past_of(state), Past(np.zeros((1, 6)), np.full((1, 6), -np.inf))
    sums = {"w": [], "u": []}
    for b, (layout, allowed) in enumerate(zip(LAYOUTS, allowed_B1, strict=True)):
        for tokens, continues in documents(layout):
            row = Past(past.mean[b : b + 1], past.log_weight[b : b + 1]) if continues else nothing
            want = formula(w, u, k[b : b + 1, tokens], v[b : b + 1, tokens], row, dy[b : b + 1, tokens])
            check(y[b : b + 1, tokens], want["y"], allowed)
            check(grads[2][b : b + 1, tokens], want["k"], allowed)
            check(grads[3][b : b + 1, tokens], want["v"], allowed)
            for name, terms in sums.items():
                terms.append(want[name])
            if continues:
                num_gradient = Sized(*(x / state.den[b : b + 1] for x in want["past_mean"]))
                check(grads[4].num[b : b + 1], num_gradient, allowed)
        check(past_of(after).mean[b : b + 1], want["mean"], allowed)
        check(past_of(after).log_weight[b : b + 1], want["log_weight"], allowed)
        if not any(continues for _, continues in documents(layout)):
            assert not any(np.any(x[b]) for x in grads[4])
    for actual, name in zip(grads[:2], sums, strict=True):
        total = Sized(*(np.sum([x[i] for x in sums[name]], axis=(0, 1)) for i in range(2)))
        check(actual, total, allowed_B1.max())
    assert not np.any(grads[2][padding_BT]) and not np.any(grads[3][padding_BT])


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_no_gradient_crosses_a_reset(form):
    w, u, k, v, state, dy = (jax.tree.map(np.copy, x) for x in case(16))
    dy[:, :9] = 0  # a loss on the second document alone
    masks = {"reset_BT": np.arange(16) == np.full((ROWS, 1), 9)}
    _, _, (_, _, dk, dv, dstate) = run(form, (13, 3), w, u, k, v, state, dy, masks)
    assert not np.any(dk[:, :9]) and not np.any(dv[:, :9])
    assert not any(np.any(x) for x in dstate)
    assert np.all(np.any(dv[:, 9:], axis=1))


# -------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_the_scale_of_a_state_is_a_gauge(form):
    """(num e^-c, den e^-c, log_scale + c) is the same past, with the same gradients of a and b."""
    w, u, k, v, state, dy = case(20)
    c = 5.0
    same = WKV4State(state.num * np.exp(-c), state.den * np.exp(-c), state.log_scale + np.float32(c))
    y, after, grads = run(form, (17, 3), w, u, k, v, state, dy)
    y2, after2, grads2 = run(form, (17, 3), w, u, k, v, jax.tree.map(np.float32, same), dy)
    np.testing.assert_allclose(y, y2, atol=1e-5)
    for x, x2 in zip(past_of(after), past_of(after2), strict=True):
        np.testing.assert_allclose(x, x2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[4].num, grads2[4].num * np.exp(-c), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(grads[4].log_scale, grads2[4].log_scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_the_empty_state_is_no_past_and_has_no_gradient(form):
    w, u, k, v, _, dy = case(20)
    y, after, grads = run(form, (17, 3), w, u, k, v, WKV4State.empty(ROWS, len(w)), dy)
    assert not any(np.any(x) for x in grads[4])
    np.testing.assert_array_equal(y[:, 0], v[:, 0])
    y_none, after_none = jax.jit(functools.partial(wkv4, impl=form))(w, u, k, v)
    want = formula(w, u, k, v, past_of(WKV4State.empty(ROWS, len(w))), dy)
    allowed = budget(np.float32, 20, *spread_and_largest(u, k, WKV4State.empty(ROWS, len(w))))
    for ys, state in ((y, after), (y_none, after_none)):
        check(ys, want["y"], allowed)
        check(past_of(state).mean, want["mean"], allowed)
        check(past_of(state).log_weight, want["log_weight"], allowed)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_no_tokens_leave_the_state_untouched(form):
    w, u, k, v, state, _ = case(20)
    y, after = wkv4(w, u, k[:, :0], v[:, :0], state, impl=form)
    assert y.shape == (ROWS, 0, len(w))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    padding = functools.partial(wkv4, valid_BT=np.zeros((ROWS, 2), bool), impl=form)
    for before in (state, WKV4State.empty(ROWS, len(w))):
        after = jax.jit(padding)(w, u, k[:, :2], v[:, :2], before)[1]
        jax.tree.map(np.testing.assert_array_equal, after, before)


# ------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_gradient_identities_of_appendix_h(x64, form):
    """d wkv_T / d W_v = E[x] and d wkv_T / d W_k = cov(x, v) under the weights of the last token."""
    rng = np.random.default_rng(0)
    T, D = 12, 5
    x_TD, w, u = rng.standard_normal((T, D)), -np.exp(rng.standard_normal(D)), rng.standard_normal(D)
    key_DD, value_DD = rng.standard_normal((2, D, D))

    def last(key_DD, value_DD):
        k_BTD, v_BTD = ((x_TD @ m.T)[None] for m in (key_DD, value_DD))
        return wkv4(w, u, k_BTD, v_BTD, impl=form)[0][0, -1]

    dkey_iij, dvalue_iij = jax.jit(jax.jacrev(last, argnums=(0, 1)))(jnp.array(key_DD), jnp.array(value_DD))
    own = lambda d_iij: np.einsum("iij->ij", d_iij)

    k_TD, v_TD = x_TD @ key_DD.T, x_TD @ value_DD.T
    age_T1 = np.arange(T - 2, -2, -1)[:, None]
    weights_TD = np.exp(k_TD + np.where(age_T1 < 0, u, age_T1 * w))
    weights_TD /= weights_TD.sum(0)
    mean_ij = weights_TD.T @ x_TD
    covariance_ij = (weights_TD * v_TD).T @ x_TD - mean_ij * (weights_TD * v_TD).sum(0)[:, None]
    np.testing.assert_allclose(own(dvalue_iij), mean_ij, rtol=1e-12)
    np.testing.assert_allclose(own(dkey_iij), covariance_ij, rtol=1e-10, atol=1e-13)
    assert (np.abs(own(dvalue_iij)) <= np.abs(x_TD).max(0)).all()


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_vmap_and_remat_change_nothing(form):
    w, u, k, v, state, dy = case(20)

    @jax.checkpoint
    def row(k_TD, v_TD, state):
        y_BTD, after = wkv4(w, u, k_TD[None], v_TD[None], jax.tree.map(lambda x: x[None], state), impl=form)
        return y_BTD[0], jax.tree.map(lambda x: x[0], after)

    def loss(k_TD, v_TD, state, dy_TD):
        y_TD, after = row(k_TD, v_TD, state)
        return (y_TD * dy_TD).sum(), (y_TD, after)

    grads, (y, after) = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)))(k, v, state, dy)
    want_y, want_after, want_grads = run(form, (20,), w, u, k, v, state, dy)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, (y, after, grads), (want_y, want_after, want_grads[2:]))
