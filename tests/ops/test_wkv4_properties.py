"""Properties of `ops.wkv4` for any input, each form within the bound that experiments/precision states for it."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wkv4_cases import PIECES
from wkv4_forms import FORMS, FORMS_AND_SLOWLY_PALLAS, budget, check_all, run
from wkv4_formula import formula, past_of

from experiments.precision.bounds import STEPS, bound
from rwkv_jax.ops import WKV4State, wkv4

EPS = np.finfo(np.float32).eps


def check_averages(form, pieces, w, u, k, v, state, dy, reset, valid):
    """Outputs lie between the values that a token has seen; these, the state and all gradients follow Eq. 16."""
    B, T, _ = k.shape
    reset, dy = reset & valid, np.where(valid[..., None], dy, 0)  # outputs at padding are undefined
    y, after, grads = run(form, pieces, w, u, k, v, state, dy, {"reset_BT": reset, "valid_BT": valid})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, after, grads)))

    steps, past = sum(STEPS[form][1](piece) for piece in pieces), past_of(state)
    low, high = seen(v, past.mean, reset, valid)
    y = np.asarray(y)
    slack = EPS * (2 * steps + 4) * np.maximum(abs(low), abs(high)) + np.finfo(np.float32).tiny
    outside = np.maximum(low - y, y - high) / slack
    assert outside[valid].max(initial=0) <= 1, f"outside by {outside[valid].max():.3g} times what rounding explains"

    allowed = sum(bound(form, piece, 0) for piece in pieces) + EPS * spreads(u, k, past.log_weight, reset, valid)
    want = formula(w, u, k, v, past, dy, reset, valid)
    y = np.where(valid[..., None], y, 0)
    terms = T * T * max(1, abs(dy).max()) * max(1, abs(v).max(), abs(past.mean).max())
    check_all(y, after, grads, state, want, allowed, allowed.max() + EPS * B * T, terms=terms)


def spreads(u, k, log_weight, reset, valid):
    """[B, 1]: how far apart the log weights of a row's tokens and past are."""
    first = valid & (np.cumsum(valid, axis=1) == 1)
    unseen = (reset & first).any(1) | ~valid.any(1)
    fill = np.where(valid.any(1)[:, None], k[np.arange(len(k)), valid.argmax(1)], log_weight)
    past = np.where((unseen & valid.any(1))[:, None], fill, log_weight)
    logs = np.concatenate([np.where(valid[..., None], k, past[:, None]), past[:, None]], axis=1)
    return np.ptp(logs, axis=1).max(-1, keepdims=True) + abs(u).max()


def seen(v, past_mean, reset, valid):
    """Least and largest value [B, T, D] that each token's document has shown it."""
    low, high = np.empty(v.shape), np.empty(v.shape)
    least = largest = past_mean
    for t in range(v.shape[1]):
        first, counts, now = reset[:, t, None], valid[:, t, None], v[:, t]
        least = np.where(first, now, np.where(counts, np.minimum(least, now), least))
        largest = np.where(first, now, np.where(counts, np.maximum(largest, now), largest))
        low[:, t], high[:, t] = least, largest
    return low, high


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
@pytest.mark.parametrize("seed", range(4))
def test_wkv4_is_an_average_with_right_gradients_on_random_rows(form, seed):
    """The shapes of test_wkv4.py, whose program this runs again."""
    rng, pieces, (B, T, D) = np.random.default_rng(seed), PIECES[form], (32, sum(PIECES[form]), 6)
    eighths = lambda most, *shape: rng.integers(-8 * most, 8 * most + 1, shape) / 8  # no values that underflow
    draw = lambda most, *shape: rng.uniform(-most, most, shape)

    def pick(*choices):
        """One of the choices for each row."""
        return np.stack(np.broadcast_arrays(*choices))[rng.integers(len(choices), size=B), np.arange(B)]

    wide, mild = draw(1e4, B, T, D), draw(5, B, T, D)
    k = pick(wide, mild, mild + draw(1e4, B, 1, 1), wide[:, :1])
    v = pick(eighths(1000, B, T, D), eighths(1000, B, 1, D))
    w = -(10.0 ** rng.uniform(-8, 4, D))
    w[rng.integers(D)] = (0, -np.inf, -1e-8, -1e4)[seed]
    den = rng.uniform(0.5, 2, (B, D)).astype(np.float32)
    state = WKV4State(np.float32(eighths(1000, B, D)) * den, den, np.float32(draw(1e4, B, D)))
    random = lambda: rng.random((B, T)) < rng.choice([0.1, 0.5, 0.9], (B, 1))
    reset, valid = pick(np.zeros((B, T), bool), np.True_, random()), pick(np.ones((B, T), bool), random())
    inputs = (np.asarray(x, np.float32) for x in (w, draw(100, D), k, v))
    check_averages(form, pieces, *inputs, state, eighths(10, B, T, D).astype(np.float32), reset, valid)


# ------------------------------------------------------------------------- what hypothesis looks for, and shrinks

B, T, D = 2, 40, 3

floats = lambda low, high: st.floats(low, high, width=32)
eighths = lambda most: st.integers(-8 * most, 8 * most).map(lambda n: n / 8)
array = lambda elements, *shape: hypothesis.extra.numpy.arrays(np.float32, shape, elements=elements)
mask = hypothesis.extra.numpy.arrays(bool, (B, T), elements=st.booleans())
whole = lambda value: st.just(np.full((B, T), value))

log_decays = st.one_of(st.sampled_from([0.0, -np.inf, -1e-8, -1e4]), floats(-8, 4).map(lambda x: -(10.0**x)))
log_weights = st.one_of(
    array(floats(-1e4, 1e4), B, T, D),
    array(floats(-5, 5), B, T, D),
    st.tuples(array(floats(-5, 5), B, T, D), floats(-1e4, 1e4)).map(sum),  # a large common offset
    st.tuples(array(floats(-1e4, 1e4), B, 1, D), st.just(np.zeros((B, T, D), np.float32))).map(sum),  # constant
)
values = st.one_of(
    array(eighths(1000), B, T, D),
    st.tuples(array(eighths(1000), B, 1, D), st.just(np.zeros((B, T, D), np.float32))).map(sum),
)
states = st.builds(
    lambda mean, den, log_scale: WKV4State(mean * den, den, log_scale),
    array(eighths(1000), B, D),
    array(floats(0.5, 2), B, D),
    array(floats(-1e4, 1e4), B, D),
)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    w=array(log_decays, D),
    u=array(floats(-100, 100), D),
    k=log_weights,
    v=values,
    state=states,
    dy=array(eighths(10), B, T, D),
    reset=st.one_of(whole(False), whole(True), mask),
    valid=st.one_of(whole(True), mask),
)
@pytest.mark.parametrize("form", FORMS)
def test_wkv4_is_an_average_with_right_gradients_on_any_rows(form, w, u, k, v, state, dy, reset, valid):
    check_averages(form, (33, 7), w, u, k, v, state, dy, reset, valid)


@pytest.mark.parametrize("length", [2, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_wkv4_derivatives_by_the_matrices_are_a_mean_and_a_covariance(form, length, x64):
    """Appendix H: of k = x W_k and v = x W_v, under the weights of Eq. 16; hence bounded, however long the past."""
    rng = np.random.default_rng(length)
    x_TJ, by_k_JD, by_v_JD = rng.normal(size=(length, 4)), rng.normal(size=(4, D)), rng.normal(size=(4, D))
    w_D, u_D = -np.exp(rng.normal(-3, 2, D)), rng.normal(size=D)
    last = lambda *matrices: wkv4(w_D, u_D, *(x_TJ[None] @ m for m in matrices), impl=form)[0][0, -1]
    by_k_DJD, by_v_DJD = jax.jit(jax.jacrev(last, argnums=(0, 1)))(jnp.asarray(by_k_JD), jnp.asarray(by_v_JD))

    k_TD, v_TD = x_TJ @ by_k_JD, x_TJ @ by_v_JD
    log_TD = k_TD + np.where(
        np.arange(length)[:, None] < length - 1, (length - 2 - np.arange(length))[:, None] * w_D, u_D
    )
    weight_TD = np.exp(log_TD - log_TD.max(axis=0))
    weight_TD /= weight_TD.sum(axis=0)
    mean_JD = np.einsum("td,tj->jd", weight_TD, x_TJ)
    covariance_JD = np.einsum("td,tj,td->jd", weight_TD, x_TJ, v_TD) - mean_JD * np.einsum("td,td->d", weight_TD, v_TD)

    own = np.eye(D)[:, None]  # a channel has columns of its own
    allowed = budget(np.float64, length, np.ptp(log_TD), abs(log_TD).max()) * abs(x_TJ).max()
    np.testing.assert_allclose(by_v_DJD, own * mean_JD, rtol=0, atol=allowed)
    np.testing.assert_allclose(by_k_DJD, own * covariance_JD, rtol=0, atol=4 * allowed * abs(v_TD).max())
    assert (abs(mean_JD) <= abs(x_TJ).max(axis=0)[:, None]).all()
