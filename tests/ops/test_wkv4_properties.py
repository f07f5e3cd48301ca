"""Properties of `ops.wkv4` for any input, each form within the bound that experiments/precision states for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operators import run
from wkv4_cases import FORMS_AND_SLOWLY_PALLAS, PIECES, budget, check_random, random_case

from experiments.precision.bounds import STEPS
from rwkv_jax.ops import wkv4
from rwkv_jax.ops.wkv4 import FORMS


@pytest.mark.parametrize(
    ("form", "seed"),
    [
        *((form, seed) for form in FORMS for seed in range(4)),
        *(pytest.param(form, seed, marks=pytest.mark.slow) for form in FORMS for seed in range(4, 24)),
    ],
)
def test_wkv4_and_its_gradients_follow_eq_16_in_packed_and_padded_rows(form, seed):
    """Compares outputs, final state and all gradients in every regime, with the state carried between two calls."""
    pieces = PIECES[form]
    inputs, masks = random_case(seed, sum(pieces))
    steps = sum(STEPS[form][1](piece) for piece in pieces)
    check_random(*run(wkv4, form, pieces, *inputs, masks), inputs, masks, steps)


@pytest.mark.parametrize("form", FORMS_AND_SLOWLY_PALLAS)
def test_wkv4_derivatives_by_the_matrices_are_a_mean_and_a_covariance(form, x64):
    """Appendix H, for k = x W_k and v = x W_v under the weights of Eq. 16: the derivatives are bounded for any
    past."""
    length, D, rng = 100, 3, np.random.default_rng(0)
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
