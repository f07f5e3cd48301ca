"""Reach: the gradient by each token's own embedding, against differences of the loss, and what is kept of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from experiments.reach import run
from rwkv_jax.corpora import Split


def test_norms_are_those_of_the_derivative_by_one_token(x64):
    model = rwkv_jax.build("rwkv4", vocab_size=11, num_layers=1, dim=4, dtype="float64", param_dtype="float64")
    tokens_BT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    rng = np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), params)  # nothing is zero
    norms_BT = run.norms(model, params, tokens_BT)
    assert norms_BT.shape == (2, 4)

    @jax.jit
    @jax.vmap
    def loss(step_D):
        """Of the second row, whose first token is nowhere else: three places before the last input."""
        own = params | {"emb": {"embedding": jnp.asarray(params["emb"]["embedding"]).at[9].add(step_D)}}
        logits_BTV, _ = model.apply({"params": own}, tokens_BT[1:, :-1])
        return -jax.nn.log_softmax(logits_BTV[0, -1])[3]

    steps = 1e-5 * np.eye(4)
    gradient_D = (loss(steps) - loss(-steps)) / 2e-5
    assert norms_BT[1, 3] == pytest.approx(np.linalg.norm(gradient_D), rel=1e-6)


def test_a_curve_says_how_far_back_the_most_of_it_is():
    norms_BT = np.tile(0.5 ** np.arange(64.0), (3, 1)) * np.array([[1], [2], [3]])
    its = run.curve(norms_BT, points=10)
    assert its["reach"] == 4  # 1 - 2^-5 is the first sum above 0.95
    near = (2 - 2**-7) / 8
    assert its["far"] == pytest.approx(2**-31 / 32 / near, rel=1e-6)
    assert its["lag"][0] == 0 and its["mean"][0] == pytest.approx(1 / near)
    assert its["low"][0] < its["mean"][0] < its["high"][0]


@pytest.mark.parametrize("far, verdict", [(1e-3, "same sign"), (1e-9, "not resolved"), (1.1, "contradicted")])
def test_verdicts(far, verdict):
    assert run.verdict(far) == verdict


def test_beginnings_are_of_documents_that_are_long_enough():
    split = Split(np.array([0, 1, 2, 0, 3, 0, 4, 5, 6]), np.array([0, 3, 5]), (), 6)
    assert run.beginnings(split, 5, 3).tolist() == [[0, 1, 2], [0, 4, 5]]
    with pytest.raises(ValueError, match="no held-out document has 5 tokens"):
        run.beginnings(split, 5, 5)
