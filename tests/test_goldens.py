"""RWKV-4 against what the released code computes (`goldens/make_goldens.py`)."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from judge import error_ratio, worst_ratio

from rwkv_jax.interop.official import from_official, to_official

GOLDENS = Path(__file__).parent / "goldens"


def split(arrays, folder):
    return {name.removeprefix(f"{folder}/"): x for name, x in arrays.items() if name.startswith(f"{folder}/")}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "rwkv4.npz") as file:
        arrays = dict(file)
    return {
        "weights": split(arrays, "weights"),
        "tokens_BT": arrays["tokens_BT"],
        "logits": split(arrays, "logits"),
        "gradients": split(arrays, "gradients"),
    }


def ours(weights, scan):
    model, params = from_official(weights, dtype="float32", scan=scan)
    return model.clone(matmul_precision="highest"), params


def gradients_of(model, params, tokens_BT):
    """(logits, gradients of the mean next-token loss by official name)."""

    @jax.jit
    def run(params):
        def loss(params):
            logits_BTV, _ = model.apply({"params": params}, tokens_BT)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:])
            return losses.mean(), logits_BTV

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits_BTV = run(params)
    return logits_BTV, to_official(jax.tree.map(np.asarray, gradients))


def agree(logits_BTV, gradients, want_logits, want_gradients):
    for want in want_logits.values():
        assert error_ratio(logits_BTV, want) < 1e-5
        assert np.abs(logits_BTV - want).max() < 1e-5 * np.abs(want).max()
        assert worst_ratio(logits_BTV, want) < 1e-5
    assert gradients.keys() == want_gradients.keys()
    for name, want in want_gradients.items():
        assert error_ratio(gradients[name], want) < 1e-5, name
        assert np.abs(gradients[name] - want).max() < 1e-5 * np.abs(want).max(), name


@pytest.mark.parametrize("scan", [True, False])
def test_logits_and_gradients_are_those_of_the_released_code(golden, scan):
    assert golden["logits"].keys() == {"rwkv", "hf"} and len(golden["gradients"]) == 6 + 3 * 18
    model, params = ours(golden["weights"], scan)
    agree(*gradients_of(model, params, golden["tokens_BT"]), golden["logits"], golden["gradients"])


@pytest.mark.parametrize("wkv_impl", ["scan", "associative"])
def test_token_by_token_logits_are_those_of_the_released_code(golden, wkv_impl):
    model, params = ours(golden["weights"], scan=False)
    model, tokens_BT = model.clone(wkv_impl=wkv_impl), golden["tokens_BT"]
    step = jax.jit(model.apply)
    state, logits = model.init_state(len(tokens_BT)), []
    for t in range(tokens_BT.shape[1]):
        out, state = step({"params": params}, tokens_BT[:, t : t + 1], state)
        logits.append(out)
    assert error_ratio(np.concatenate(logits, axis=1), golden["logits"]["rwkv"]) < 1e-5


@pytest.mark.live
@pytest.mark.parametrize("seed", [10, 11])
def test_live_judges_agree_on_fresh_weights(seed, monkeypatch):
    """The judges themselves, run here: whole sequences, gradients, and the state carried token by token."""
    monkeypatch.syspath_prepend(GOLDENS)
    import make_goldens

    weights, tokens_BT = make_goldens.random_weights(seed), make_goldens.random_tokens(seed)
    logits, gradients = make_goldens.transformers_model(weights, tokens_BT)
    judges = {"hf": logits, "rwkv": make_goldens.rwkv_package(weights, tokens_BT)}
    model, params = ours(weights, scan=True)
    agree(*gradients_of(model, params, tokens_BT), judges, gradients)

    steps = make_goldens.rwkv_package(weights, tokens_BT, one_by_one=True)
    state, step = model.init_state(len(tokens_BT)), jax.jit(model.apply)
    for t in range(tokens_BT.shape[1]):
        out, state = step({"params": params}, tokens_BT[:, t : t + 1], state)
        assert error_ratio(out[:, 0], steps[:, t]) < 1e-5


@pytest.mark.live
def test_the_script_reproduces_the_stored_golden(golden, monkeypatch):
    monkeypatch.syspath_prepend(GOLDENS)
    import make_goldens

    weights, tokens_BT = make_goldens.random_weights(0), make_goldens.random_tokens(1)
    np.testing.assert_array_equal(tokens_BT, golden["tokens_BT"])
    for name, x in golden["weights"].items():
        np.testing.assert_array_equal(weights[name], x)
    logits, gradients = make_goldens.transformers_model(weights, tokens_BT)
    agree(logits, gradients, golden["logits"], golden["gradients"])
