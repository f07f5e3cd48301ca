"""Ablation switches of RWKV-4: each changes its part alone, in every form of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from judge import assert_same, error_ratio
from scipy import special
from small import D, forward, made, make, token_by_token, tokens

import rwkv_jax
from rwkv_jax import interop
from rwkv_jax.models.block import BlockConfig
from rwkv_jax.models.layers import ACTIVATIONS
from rwkv_jax.models.rwkv4 import ChannelMix, Variant
from rwkv_jax.ops import wkv4
from rwkv_jax.train import methods

B, T = 2, 6
MIXES = {"att/time_mix_k", "att/time_mix_v", "att/time_mix_r", "ffn/time_mix_k", "ffn/time_mix_r"}
GATES = {"att/receptance/kernel", "ffn/receptance/kernel", "att/time_mix_r", "ffn/time_mix_r"}
# For every part: fields, the parameters that a model then lacks, and the values of these with which the
# released model is the same.
SAME_AS = {
    "recurrence": (
        {"token_shift": False, "current_token": "plain", "previous_token": "decayed", "embedding_norm": False},
        MIXES | {"att/time_first", "ln0/scale", "ln0/bias"},
        {"time_mix_": lambda x, w: np.ones_like(x), "time_first": lambda x, w: -w},
    ),
    "gates": (
        {"receptance": False, "current_token": "excluded", "shift_v": False},
        GATES | {"att/time_first", "att/time_mix_v"},
        {
            "receptance": lambda x, w: np.zeros_like(x),
            "time_first": lambda x, w: np.full_like(x, -1e30),
            "att/time_mix_v": lambda x, w: np.ones_like(x),
        },
    ),
}
PARTS = [{"token_shift": False}, {"shift_v": False}, {"current_token": "plain"}, {"current_token": "excluded"}]
PARTS += [{"previous_token": "decayed"}, {"receptance": False}, {"activation": "relu"}, {"activation": "gelu"}]

IDS, RNG = tokens(B, T), np.random.default_rng(1)
RESET, VALID = RNG.random((B, T)) < 0.3, RNG.random((B, T)) < 0.7


def parallel(model, params):
    """(logits, state after the last token) from an empty past, by one program for each model."""
    return forward(model, params, IDS, model.init_state(B), RESET, VALID)


def logits_of(model, params):
    """Logits of the tokens that are not padding."""
    return np.asarray(parallel(model, params)[0])[VALID]


def names_of(params):
    return {path.removeprefix("blocks/") for path in flatten_dict(params, sep="/")}


@pytest.mark.parametrize("name", SAME_AS)
def test_rwkv4_variant_state_carries_over_tokens_resets_and_padding(name):
    model, params = made("rwkv4", **SAME_AS[name][0])
    logits, end = parallel(model, params)
    steps, state = token_by_token(model, params, IDS, RESET, VALID)
    assert error_ratio(steps[VALID], np.asarray(logits)[VALID]) < 2e-6
    assert_same(state, end)


@pytest.mark.parametrize("name", SAME_AS)
def test_rwkv4_variant_equals_the_released_model_with_its_part_held(name):
    fields, lacks, held = SAME_AS[name]
    model, params = made("rwkv4", **fields)
    released, others = made("rwkv4")
    assert names_of(others) - names_of(params) == lacks and names_of(params) <= names_of(others)
    decay = -np.exp(params["blocks"]["att"]["time_decay"])

    def hold(path, x):
        part = next((part for part in held if part in path), None)
        return held[part](x, decay) if part else flat.get(path, x)

    flat = flatten_dict(params, sep="/")
    merged = {path: hold(path, x) for path, x in flatten_dict(others, sep="/").items()}
    if "ln0/scale" in lacks:  # LN0 does not change normed rows
        rows = flat["emb/embedding"] - flat["emb/embedding"].mean(1, keepdims=True)
        rows = rows * np.sqrt(np.float32(1 - 1e-5) / rows.var(1, keepdims=True))
        ones = np.ones(D, np.float32)
        merged |= {"emb/embedding": rows, "ln0/scale": ones, "ln0/bias": 0 * ones}
        params = params | {"emb": {"embedding": rows}}
    actual = logits_of(model, params)
    assert error_ratio(actual, logits_of(released, unflatten_dict(merged, sep="/"))) < 2e-6
    assert error_ratio(actual, logits_of(released, others)) > 1e-3


@pytest.mark.parametrize("scan", [True, False])
def test_build_passes_rwkv4_switches_to_layers_and_defaults_to_the_released(scan):
    def layer(kind="rwkv4", **fields):
        return getattr(make(kind, scan=scan, **fields).bind({}), "blocks" if scan else "blocks_1").config.variant

    fields = {"token_shift": False, "current_token": "plain", "previous_token": "decayed", "receptance": False}
    fields |= {"activation": "gelu", "matrix_init": "normal"}
    for name, value in fields.items():
        assert layer(**{name: value}) == layer(variant={name: value}) == Variant(**{name: value})
    assert layer() == layer(token_shift=True, activation="relu2") == Variant()
    transformer = layer("transformer", token_shift=None)
    assert (transformer.activation, transformer.token_shift) == ("gelu", False)
    assert layer("transformer", activation="relu").activation == "relu" and layer("transformer").token_shift


def test_rwkv4_variant_decayed_previous_token_equals_a_bonus_less_the_decay():
    """The exponent is (t - i) w in place of (t - 1 - i) w of Eq. 16; the sum is written out in float64."""
    rng = np.random.default_rng(0)
    k_TD, v_TD = rng.standard_normal((2, T, D))
    w_D, u_D = -np.exp(rng.standard_normal(D)), rng.standard_normal(D)
    expected = np.empty((T, D))
    for t in range(T):
        weights_TD = np.exp((t - np.arange(t))[:, None] * w_D + k_TD[:t])
        own_D = np.exp(u_D + k_TD[t])
        expected[t] = ((weights_TD * v_TD[:t]).sum(0) + own_D * v_TD[t]) / (weights_TD.sum(0) + own_D)
    y_BTD, _ = wkv4(*(np.float32(x) for x in (w_D, u_D - w_D, k_TD[None], v_TD[None])))
    assert error_ratio(y_BTD[0], expected) < 1e-6


def test_rwkv4_channel_mix_applies_the_activation_of_the_variant():
    """Eq. 18 written out in NumPy, with each activation."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    x_BTD, shapes = draw(B, T, D), {"key": (D, 4 * D), "value": (4 * D, D), "receptance": (D, D)}
    params = {"time_mix_k": draw(D), "time_mix_r": draw(D)}
    params |= {name: {"kernel": draw(*shape)} for name, shape in shapes.items()}
    config = lambda name: BlockConfig(D, 1, matmul_precision="highest", variant=Variant(activation=name))

    @jax.jit
    def run(params, x_BTD):
        mixing = lambda name: ChannelMix(config(name))
        apply = lambda name: mixing(name).apply({"params": params}, x_BTD, None, None, None, jnp.float32(0))[0]
        return {name: apply(name) for name in ACTIVATIONS}

    previous_BTD = np.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    mixed = lambda name: x_BTD * params[f"time_mix_{name}"] + previous_BTD * (1 - params[f"time_mix_{name}"])
    k_BTF = mixed("k") @ params["key"]["kernel"]
    hidden = {
        "relu2": np.maximum(k_BTF, 0) ** 2,
        "relu": np.maximum(k_BTF, 0),
        "gelu": k_BTF / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (k_BTF + 0.044715 * k_BTF**3))),
    }
    actual = run(params, x_BTD)
    assert actual.keys() == hidden.keys()
    for name, h_BTF in hidden.items():
        expected = special.expit(mixed("r") @ params["receptance"]["kernel"]) * (h_BTF @ params["value"]["kernel"])
        assert error_ratio(actual[name], expected) < 1e-6, name


def test_rwkv4_variant_holds_changed_switches_alone_and_has_its_fingerprint():
    released, params = made("rwkv4")
    assert released.variant == make("rwkv4", token_shift=True, activation="relu2").variant == {}
    prints = {interop.fingerprint(released, params)}
    for fields in PARTS:
        model = make("rwkv4", **fields)
        assert model.variant == fields
        if fields.keys() <= {"activation", "current_token", "previous_token"}:  # no name or shape differs
            prints.add(interop.fingerprint(model, params))
    assert len(prints) == 6  # released, plain, excluded, decayed, ReLU, GELU


def test_save_keeps_an_rwkv4_variant_or_refuses_it_in_released_formats(tmp_path):
    model, params = made("rwkv4", **SAME_AS["gates"][0], activation="relu")
    for file, format in (("a.pth", None), ("folder", None), ("a.bin", "rwkv.cpp")):
        with pytest.raises(
            ValueError, match=r"holds released models only, and this one has \w+=.*; use .safetensors"
        ) as error:
            rwkv_jax.save(tmp_path / file, model, params, format)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    rwkv_jax.save(tmp_path / "a.safetensors", model, params)
    again, read = rwkv_jax.load(tmp_path / "a.safetensors")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    released, others = made("rwkv4")
    assert interop.fingerprint(model, params) != interop.fingerprint(released, others)


def test_tuned_state_of_rwkv4_without_token_shift_has_no_last_activations():
    model = make("rwkv4", token_shift=False)
    tuned = jax.eval_shape(lambda: methods.tuned_state(model, methods.untuned_state(model), B))
    assert jax.tree.structure(tuned) == jax.tree.structure(jax.eval_shape(lambda: model.init_state(B)))


def test_build_refuses_a_switch_of_another_kind_or_type():
    with pytest.raises(ValueError, match="unknown model field 'receptance'"):
        make("transformer", receptance=False)
    with pytest.raises(ValueError, match=r"unknown switch of model.variant 'receptance': expected one of token_shift"):
        make("transformer", variant={"receptance": False})
    with pytest.raises(ValueError, match=r"unknown switch of model.variant 'shift_w': did you mean 'shift_v'"):
        make("rwkv4", variant={"shift_w": False})
    with pytest.raises(ValueError, match=r"model.variant.receptance is 1, expected a bool"):
        make("rwkv4", receptance=1)
    with pytest.raises(ValueError, match=r"unknown model.variant.current_token 'bonu': did you mean 'bonus'"):
        make("rwkv4", current_token="bonu")
