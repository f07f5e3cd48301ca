"""RWKV-4 against the released code's numbers (`goldens/make_goldens.py`)."""

import functools
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from judge import error_ratio, worst_ratio
from small import one_by_one

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


@functools.partial(jax.jit, static_argnums=0)
def gradients_of(model, params, tokens_BT):
    """(gradients of the mean next-token loss, logits)."""

    def loss(params):
        logits_BTV, _ = model.apply({"params": params}, tokens_BT)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:])
        return losses.mean(), logits_BTV

    return jax.grad(loss, has_aux=True)(params)


def assert_same_logits(actual_BTV, expected):
    for name, want_BTV in expected.items():
        assert np.abs(actual_BTV - want_BTV).max() < 1e-5 * np.abs(want_BTV).max(), name
        assert worst_ratio(actual_BTV, want_BTV) < 1e-5, name


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert error_ratio(actual[name], want) < 1e-5, name
        assert np.abs(actual[name] - want).max() < 1e-5 * np.abs(want).max(), name


def assert_agrees(weights, tokens_BT, logits, gradients, scan):
    """Compare logits and gradients of our model with the released code's."""
    ours_by_path, logits_BTV = gradients_of(*ours(weights, scan), tokens_BT)
    assert_same_logits(logits_BTV, logits)
    assert_same_gradients(to_official(jax.tree.map(np.asarray, ours_by_path)), gradients)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rwkv4_logits_and_gradients_match_the_released_code(golden, scan):
    assert golden["logits"].keys() == {"rwkv", "hf"} and len(golden["gradients"]) == 6 + 3 * 18
    assert_agrees(*golden.values(), scan)


def test_rwkv4_token_by_token_logits_match_the_released_code(golden):
    model, params = ours(golden["weights"], scan=False)
    tokens_BT = golden["tokens_BT"]
    logits_BTV, _ = one_by_one(model, params, tokens_BT, model.init_state(len(tokens_BT)))
    assert error_ratio(logits_BTV, golden["logits"]["rwkv"]) < 1e-5


@pytest.mark.live
@pytest.mark.parametrize("seed", [10, 11])
def test_rwkv4_agrees_with_both_reference_packages_on_fresh_weights(seed, monkeypatch):
    """Compares whole sequences, gradients, and token-by-token passes with packages that run here."""
    monkeypatch.syspath_prepend(GOLDENS)
    import make_goldens

    weights, tokens_BT = make_goldens.random_weights(seed), make_goldens.random_tokens(seed)
    logits, gradients = make_goldens.transformers_model(weights, tokens_BT)
    references = {"hf": logits, "rwkv": make_goldens.rwkv_package(weights, tokens_BT)}
    assert_agrees(weights, tokens_BT, references, gradients, scan=True)

    model, params = ours(weights, scan=True)
    found_BTV, _ = one_by_one(model, params, tokens_BT, model.init_state(len(tokens_BT)))
    wanted_BTV = make_goldens.rwkv_package(weights, tokens_BT, one_by_one=True)
    assert worst_ratio(found_BTV, wanted_BTV, axis=1) < 1e-5


@pytest.mark.live
def test_make_goldens_reproduces_the_stored_golden(golden, monkeypatch):
    monkeypatch.syspath_prepend(GOLDENS)
    import make_goldens

    weights, tokens_BT = make_goldens.random_weights(0), make_goldens.random_tokens(1)
    np.testing.assert_array_equal(tokens_BT, golden["tokens_BT"])
    for name, x in golden["weights"].items():
        np.testing.assert_array_equal(weights[name], x)
    logits, gradients = make_goldens.transformers_model(weights, tokens_BT)
    assert_same_logits(logits, golden["logits"])
    assert_same_gradients(gradients, golden["gradients"])
