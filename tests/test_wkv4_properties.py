"""What holds of `ops.wkv4` whatever comes in, each form within the bound that experiments/precision states for it."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wkv4_forms import FORMS_AND_SLOWLY_PALLAS, budget, check_all, run
from wkv4_formula import packed, past_of

from experiments.precision.bounds import STEPS, bound
from rwkv_jax.ops import WKV4State, wkv4

B, T, D = 2, 40, 3
PIECES = (33, 7)  # more than a chunk of the scan, then the state carried on
EPS = np.finfo(np.float32).eps

floats = lambda low, high: st.floats(low, high, width=32)
eighths = lambda most: st.integers(-8 * most, 8 * most).map(lambda n: n / 8)  # no values that underflow
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
documents = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "reset_BT": st.one_of(whole(True), whole(False), mask),
            "valid_BT": st.one_of(whole(True), mask),
        }
    ),
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    w=array(log_decays, D),
    u=array(floats(-100, 100), D),
    k=log_weights,
    v=values,
    state=states,
    dy=array(eighths(10), B, T, D),
    masks=documents,
)
@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_any_tokens_give_averages_of_what_they_see_and_right_gradients(form, w, u, k, v, state, dy, masks):
    reset, valid = np.zeros((B, T), bool), np.ones((B, T), bool)
    if masks is not None:
        reset, valid = masks["reset_BT"] & masks["valid_BT"], masks["valid_BT"]
    dy = np.where(valid[..., None], dy, 0)  # what padding reads means nothing
    y, after, grads = run(form, PIECES, w, u, k, v, state, dy, masks)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, after, grads)))

    steps, past = sum(STEPS[form][1](piece) for piece in PIECES), past_of(state)
    low, high = seen(v, past.mean, reset, valid)
    slack = EPS * (2 * steps + 4) * np.maximum(abs(low), abs(high)) + np.finfo(np.float32).tiny
    outside = np.maximum(low - y, y - high) / slack
    assert outside[valid].max(initial=0) <= 1, f"outside by {outside[valid].max():.3g} times what rounding explains"

    spread = spreads(u, k, past.log_weight, reset, valid)
    allowed = sum(bound(form, piece, 0) for piece in PIECES) + EPS * spread
    want = packed(w, u, k, v, past, dy, reset, valid)
    y = np.where(valid[..., None], y, 0)
    terms = T * T * max(1, abs(dy).max()) * max(1, abs(v).max(), abs(past.mean).max())
    check_all(y, after, grads, state, want, allowed, allowed.max() + EPS * B * T, terms=terms)


def spreads(u, k, log_weight, reset, valid):
    """[B, 1]: how far apart the log weights of a row's tokens and past are."""
    rows = []
    for b in range(B):
        tokens = k[b, valid[b]]
        past = log_weight[b : b + 1] if not reset[b, valid[b]][:1].any() else tokens
        logs = np.concatenate([tokens, past])
        rows.append(np.ptp(logs, axis=0).max())
    return np.array(rows)[:, None] + abs(u).max()


def seen(v, past_mean, reset, valid):
    """Least and largest value [B, T, D] that each token's document has shown it."""
    low, high = np.empty(v.shape), np.empty(v.shape)
    for b in range(B):
        least = largest = past_mean[b]
        for t in range(T):
            if reset[b, t]:
                least, largest = v[b, t], v[b, t]
            elif valid[b, t]:
                least, largest = np.minimum(least, v[b, t]), np.maximum(largest, v[b, t])
            low[b, t], high[b, t] = least, largest
    return low, high


@pytest.mark.parametrize("length", [2, 100])
@pytest.mark.parametrize("form", ["scan", "associative"])
def test_derivatives_by_the_matrices_are_a_mean_and_a_covariance(form, length, x64):
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
