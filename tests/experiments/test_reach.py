"""Reach: the gradient of the last loss by the embedding of each token, and the curve kept in the results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from experiments.reach import run
from rwkv_jax.data import Split


class Fading:
    """A model whose hidden value halves with every token, so that gradients along time are known."""

    dim = 4

    def clone(self, vocab_size):
        return self

    def apply(self, variables, x, method):
        params = variables["params"]
        if method == "logits":
            return x @ params["head"]
        T = x.shape[1]
        weights_TT = np.tril(0.5 ** np.subtract.outer(np.arange(T), np.arange(T)).clip(0))
        return jnp.einsum("ts,bsd->btd", weights_TT, params["emb"]["embedding"][x]), None


def test_norms_are_those_of_the_gradient_of_the_last_loss_by_each_input():
    tokens_BT, rng = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.random.default_rng(0)
    embedding_VD, head_DV = (rng.standard_normal(shape).astype(np.float32) for shape in ((11, 4), (4, 11)))
    norms_BT = run.norms(Fading(), {"emb": {"embedding": embedding_VD}, "head": head_DV}, tokens_BT)
    hidden_BD = np.einsum("s,bsd->bd", 0.5 ** np.arange(4)[::-1], embedding_VD[tokens_BT[:, :-1]])
    p_BV = np.exp(hidden_BD @ head_DV)
    error_BV = p_BV / p_BV.sum(axis=1, keepdims=True) - np.eye(11)[tokens_BT[:, -1]]
    norms_B = np.linalg.norm(error_BV @ head_DV.T, axis=1)
    np.testing.assert_allclose(norms_BT, norms_B[:, None] * 0.5 ** np.arange(4), rtol=1e-5)


@pytest.mark.slow
def test_norms_agree_with_finite_differences_of_the_loss(x64):
    model = rwkv_jax.build("rwkv4", vocab_size=11, num_layers=1, dim=4, dtype="float64", param_dtype="float64")
    tokens_BT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    rng = np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), params)  # no parameter is zero
    norms_BT = run.norms(model, params, tokens_BT)
    assert norms_BT.shape == (2, 4)

    @jax.jit
    @jax.vmap
    def loss(step_D):
        """Loss of the second row, whose first token, 9, occurs only there: three places before the last input."""
        own = params | {"emb": {"embedding": jnp.asarray(params["emb"]["embedding"]).at[9].add(step_D)}}
        logits_BTV, _ = model.apply({"params": own}, tokens_BT[1:, :-1])
        return -jax.nn.log_softmax(logits_BTV[0, -1])[3]

    steps = 1e-5 * np.eye(4)
    gradient_D = (loss(steps) - loss(-steps)) / 2e-5
    assert norms_BT[1, 3] == pytest.approx(np.linalg.norm(gradient_D), rel=1e-6)


def test_reach_curve_reports_the_lag_within_which_most_of_the_gradient_lies():
    norms_BT = np.tile(0.5 ** np.arange(64.0), (3, 1)) * np.array([[1], [2], [3]])
    its = run.curve(norms_BT, points=10)
    assert its["reach"] == 4  # 1 - 2^-5 is the first sum above 0.95
    near = (2 - 2**-7) / 8
    assert its["far"] == pytest.approx(2**-31 / 32 / near, rel=1e-6)
    assert its["lag"][0] == 0 and its["mean"][0] == pytest.approx(1 / near)
    assert its["low"][0] < its["mean"][0] < its["high"][0]


def test_reach_verdict_follows_the_far_half():
    assert [run.verdict(far) for far in (1e-3, 1e-9, 1.1)] == ["same sign", "not resolved", "contradicted"]


def test_beginnings_skip_documents_that_are_too_short():
    split = Split(np.array([0, 1, 2, 0, 3, 0, 4, 5, 6]), np.array([0, 3, 5]), (), 6)
    assert run.beginnings(split, 5, 3).tolist() == [[0, 1, 2], [0, 4, 5]]
    with pytest.raises(ValueError, match="no held-out document has 5 tokens"):
        run.beginnings(split, 5, 5)
