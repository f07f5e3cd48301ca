"""Models with one part of RWKV-4 exchanged: each changes that part alone, and in every form of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from judge import error_ratio
from small import D, V, forward, made, make, tokens

import rwkv_jax
from rwkv_jax import finetune, interop
from rwkv_jax.models import build, unstack, upgraded
from rwkv_jax.models.layers import ACTIVATIONS
from rwkv_jax.ops import wkv4

B, T = 2, 6
MIXES = {"att/time_mix_k", "att/time_mix_v", "att/time_mix_r", "ffn/time_mix_k", "ffn/time_mix_r"}
GATES = {"att/receptance/kernel", "ffn/receptance/kernel", "att/time_mix_r", "ffn/time_mix_r"}
# Fields, the parameters that the model then lacks, and the values of them with which the released model is the same.
SAME_AS = {
    "no token shift": ({"token_shift": False}, MIXES, {"time_mix_": lambda x, w: jnp.ones_like(x)}),
    "no u": ({"current_token": "plain"}, {"att/time_first"}, {"time_first": lambda x, w: jnp.zeros_like(x)}),
    "no current token": (
        {"current_token": "excluded"},
        {"att/time_first"},
        {"time_first": lambda x, w: jnp.full_like(x, -1e30)},
    ),
    "exponent n": ({"previous_token": "decayed"}, set(), {"time_first": lambda x, w: x - w}),
    "no receptance": ({"receptance": False}, GATES, {"receptance": lambda x, w: jnp.zeros_like(x)}),
    "no LN0": ({"embedding_norm": False}, {"ln0/scale", "ln0/bias"}, {}),
}
OTHERS = {
    "ReLU": {"activation": "relu"},
    "GELU": {"activation": "gelu"},
    "all at once": {"token_shift": False, "previous_token": "decayed", "receptance": False, "activation": "gelu"},
}
VARIANTS = {name: fields for name, (fields, _, _) in SAME_AS.items()} | OTHERS


IDS, RNG = tokens(B, T), np.random.default_rng(1)
RESET, VALID = RNG.random((B, T)) < 0.3, RNG.random((B, T)) < 0.7


def logits_of(model, params):
    """Of the tokens that are no padding; one program a model, whatever test asks."""
    return np.asarray(forward(model, params, IDS, None, RESET, VALID)[0])[VALID]


def names_of(params):
    return {path.removeprefix("blocks/") for path in flatten_dict(params, sep="/")}


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_equals_parallel_with_resets_and_padding(name):
    model, params = made("rwkv4", **VARIANTS[name])
    unrolled, layers = make("rwkv4", scan=False, **VARIANTS[name]), unstack(params)
    logits, end = forward(model, params, IDS, None, RESET, VALID)
    state, steps = unrolled.init_state(B), []
    for t in range(T):
        one = slice(t, t + 1)
        step, state = forward(unrolled, layers, IDS[:, one], state, RESET[:, one], VALID[:, one])
        steps.append(step)
    assert error_ratio(np.concatenate(steps, axis=1)[VALID], logits[VALID]) < 2e-6
    assert jax.tree.structure(state) == jax.tree.structure(end)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        assert error_ratio(a, b) < 2e-6


@pytest.mark.parametrize("name", SAME_AS)
def test_it_equals_the_released_model_with_that_part_held(name):
    fields, lacks, held = SAME_AS[name]
    model, params = made("rwkv4", **fields)
    released, others = made("rwkv4")
    assert names_of(others) - names_of(params) == lacks and names_of(params) <= names_of(others)
    decay = -jnp.exp(params["blocks"]["att"]["time_decay"])

    def hold(path, x):
        part = next((part for part in held if part in path), None)
        return held[part](x, decay) if part else flat.get(path, x)

    flat = flatten_dict(params, sep="/")
    merged = {path: hold(path, x) for path, x in flatten_dict(others, sep="/").items()}
    if name == "no LN0":  # which leaves alone what it finds normed
        rows = flat["emb/embedding"] - flat["emb/embedding"].mean(1, keepdims=True)
        rows = rows * jnp.sqrt((1 - 1e-5) / rows.var(1, keepdims=True))
        merged |= {"emb/embedding": rows, "ln0/scale": jnp.ones(D), "ln0/bias": jnp.zeros(D)}
        params = params | {"emb": {"embedding": rows}}
    actual = logits_of(model, params)
    assert error_ratio(actual, logits_of(released, unflatten_dict(merged, sep="/"))) < 2e-6
    assert error_ratio(actual, logits_of(released, others)) > 1e-3


def test_the_default_spelled_out_is_the_default_to_the_bit():
    model, params = made("rwkv4")
    spelled = make("rwkv4", token_shift=True, activation="relu2")
    np.testing.assert_array_equal(logits_of(model, params), logits_of(spelled, params))
    transformer, its = made("transformer")
    np.testing.assert_array_equal(logits_of(transformer, its), logits_of(make("transformer", activation="gelu"), its))


def test_what_two_models_share_starts_alike():
    """Effects are paired by the initial draw: a parameter that is gone must not shift the others' draws."""
    init = lambda **fields: jax.jit(make("rwkv4", **fields).init)(jax.random.key(3), tokens(1, 1))["params"]
    released = flatten_dict(init())
    for fields in ({"receptance": False}, {"token_shift": False, "current_token": "plain", "embedding_norm": False}):
        for path, x in flatten_dict(init(**fields)).items():
            np.testing.assert_array_equal(x, released[path])


def test_the_previous_token_decayed_once_is_a_bonus_less_the_decay():
    """Exponent (t - i) w in place of (t - 1 - i) w of Eq. 16, in float64 by the sum itself."""
    rng = np.random.default_rng(0)
    k_TD, v_TD = rng.standard_normal((2, T, D))
    w_D, u_D = -np.exp(rng.standard_normal(D)), rng.standard_normal(D)
    expected = np.empty((T, D))
    for t in range(T):
        weights_TD = np.exp((t - np.arange(t))[:, None] * w_D + k_TD[:t])
        own_D = np.exp(u_D + k_TD[t])
        expected[t] = ((weights_TD * v_TD[:t]).sum(0) + own_D * v_TD[t]) / (weights_TD.sum(0) + own_D)
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    y_BTD, _ = wkv4(as_float(w_D), as_float(u_D - w_D), as_float(k_TD[None]), as_float(v_TD[None]))
    assert error_ratio(y_BTD[0], expected) < 1e-6


def test_activations_by_hand():
    x = jnp.array([-1.0, 3.0])
    values = {name: np.asarray(f(x)) for name, f in ACTIVATIONS.items()}
    np.testing.assert_allclose(values["relu2"], [0, 9])
    np.testing.assert_allclose(values["relu"], [0, 3])
    np.testing.assert_allclose(values["gelu"], [-0.1588, 2.9964], atol=1e-4)
    outputs = [logits_of(*made("rwkv4", **fields)) for fields in ({}, OTHERS["ReLU"], OTHERS["GELU"])]
    assert min(error_ratio(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


@pytest.mark.parametrize(("scheme", "dead"), [("released", False), ("printed", True), ("normal", False)])
def test_the_printed_initialiser_leaves_channel_mixing_without_a_gradient(scheme, dead):
    """For good: where the hidden channels are zero, so is their square's slope, whatever the rest has learned."""
    model = make("rwkv4", matrix_init=scheme)
    params = jax.jit(model.init)(jax.random.key(0), tokens(1, 1))["params"]
    loss = lambda params: jnp.square(model.apply({"params": params}, tokens(B, T))[0]).mean()
    gradient = jax.jit(jax.grad(loss))
    for _ in range(3):
        found = gradient(params)
        params = jax.tree.map(lambda x, dx: np.asarray(x) - 0.1 * np.asarray(dx), params, found)
    norms = [float(jnp.abs(found["blocks"]["ffn"][name]["kernel"]).max()) for name in ("key", "value", "receptance")]
    assert all((norm == 0) == dead for norm in norms), norms


def test_normal_matrices():
    model = make("rwkv4", matrix_init="normal", embedding_init="normal", num_layers=1, dim=64)
    for path, x in flatten_dict(jax.jit(model.init)(jax.random.key(0), tokens(1, 1))["params"]).items():
        if path[-1] in ("kernel", "embedding"):
            np.testing.assert_allclose(np.std(x), 0.02, rtol=0.1, err_msg=str(path))


@pytest.mark.parametrize("name", VARIANTS)
def test_files_and_fingerprints_tell_it_from_the_released_model(tmp_path, name):
    model, params = made("rwkv4", **VARIANTS[name])
    for file, format in (("a.pth", None), ("folder", None), ("a.bin", "rwkv.cpp")):
        with pytest.raises(
            ValueError, match=r"RWKV-4 as released only, and this model has \w+=.*; save it as"
        ) as error:
            rwkv_jax.save(tmp_path / file, model, params, format)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    rwkv_jax.save(tmp_path / "a.safetensors", model, params)
    again, read = rwkv_jax.load(tmp_path / "a.safetensors")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    released, others = made("rwkv4")
    assert interop.fingerprint(model, params) != interop.fingerprint(released, others)
    if names_of(params) == names_of(others):  # then no shape tells
        assert interop.fingerprint(model, others) != interop.fingerprint(released, others)


def test_a_tuned_state_without_token_shift_has_nothing_for_it():
    model = make("rwkv4", token_shift=False)
    tuned = finetune.tuned_state(finetune.untuned_state(model), B)
    assert jax.tree.structure(tuned) == jax.tree.structure(model.init_state(B))


def test_fields_of_version_0_1_mean_what_they_meant():
    old = {"vocab_size": V, "num_layers": 1, "dim": D, "token_shift": False}
    assert build("rwkv4", **upgraded(old)) == build("rwkv4", vocab_size=V, num_layers=1, dim=D)
    assert upgraded(old | {"receptance": True})["token_shift"] is False


def test_fields_of_rwkv_alone_are_refused_of_a_transformer():
    with pytest.raises(ValueError, match="model field receptance is False, which means nothing without RWKV-4 layers"):
        make("transformer", receptance=False)
