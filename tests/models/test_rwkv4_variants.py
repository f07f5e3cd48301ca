"""Ablation switches of RWKV-4: each changes its part alone, and in every form of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from judge import error_ratio
from scipy import special
from small import D, forward, made, make, tokens

import rwkv_jax
from rwkv_jax import interop
from rwkv_jax.models import unstack
from rwkv_jax.models.block import BlockConfig, make_variant
from rwkv_jax.models.layers import ACTIVATIONS
from rwkv_jax.models.rwkv4 import ChannelMix, Variant
from rwkv_jax.ops import wkv4
from rwkv_jax.train import methods

slow = pytest.mark.slow
B, T = 2, 6
MIXES = {"att/time_mix_k", "att/time_mix_v", "att/time_mix_r", "ffn/time_mix_k", "ffn/time_mix_r"}
GATES = {"att/receptance/kernel", "ffn/receptance/kernel", "att/time_mix_r", "ffn/time_mix_r"}
# Fields, the parameters that the model then lacks, and the values of them with which the released model is the same.
SAME_AS = {
    "no shift of v": ({"shift_v": False}, {"att/time_mix_v"}, {"att/time_mix_v": lambda x, w: np.ones_like(x)}),
    "no token shift": ({"token_shift": False}, MIXES, {"time_mix_": lambda x, w: np.ones_like(x)}),
    "no u": ({"current_token": "plain"}, {"att/time_first"}, {"time_first": lambda x, w: np.zeros_like(x)}),
    "no current token": (
        {"current_token": "excluded"},
        {"att/time_first"},
        {"time_first": lambda x, w: np.full_like(x, -1e30)},
    ),
    "exponent n": ({"previous_token": "decayed"}, set(), {"time_first": lambda x, w: x - w}),
    "no receptance": ({"receptance": False}, GATES, {"receptance": lambda x, w: np.zeros_like(x)}),
    "no LN0": ({"embedding_norm": False}, {"ln0/scale", "ln0/bias"}, {}),
    # all of the above in two models
    "recurrence": (
        {"token_shift": False, "current_token": "plain", "previous_token": "decayed", "embedding_norm": False},
        MIXES | {"att/time_first", "ln0/scale", "ln0/bias"},
        {"time_mix_": lambda x, w: np.ones_like(x), "time_first": lambda x, w: -w},
    ),
    "gates": (
        {"receptance": False, "current_token": "excluded"},
        GATES | {"att/time_first"},
        {"receptance": lambda x, w: np.zeros_like(x), "time_first": lambda x, w: np.full_like(x, -1e30)},
    ),
}
OTHERS = {
    "ReLU": {"activation": "relu"},
    "GELU": {"activation": "gelu"},
    "all at once": {"token_shift": False, "previous_token": "decayed", "receptance": False, "activation": "gelu"},
}
VARIANTS = {name: fields for name, (fields, _, _) in SAME_AS.items()} | OTHERS
FAST = ("recurrence", "gates")
SINGLE = [name for name in VARIANTS if name not in FAST]

IDS, RNG = tokens(B, T), np.random.default_rng(1)
RESET, VALID = RNG.random((B, T)) < 0.3, RNG.random((B, T)) < 0.7


def parallel(model, params):
    """(logits, state after the last token) from an empty past: one program a model, whatever test asks."""
    return forward(model, params, IDS, model.init_state(B), RESET, VALID)


def logits_of(model, params):
    """Of the tokens that are no padding."""
    return np.asarray(parallel(model, params)[0])[VALID]


def names_of(params):
    return {path.removeprefix("blocks/") for path in flatten_dict(params, sep="/")}


def assert_same_states(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert error_ratio(a, b) < 2e-6


@pytest.mark.parametrize("name", FAST)
def test_variant_state_carries_from_token_to_token_with_resets_and_padding(name):
    """One token of each pass is valid, so that all passes are the program of the whole sequence."""
    model, params = made("rwkv4", **VARIANTS[name])
    logits, end = parallel(model, params)
    state, steps = model.init_state(B), []
    for t in range(T):
        step, state = forward(model, params, IDS, state, RESET, VALID & (np.arange(T) == t)[None])
        steps.append(step[:, t])
    assert error_ratio(np.stack(steps, axis=1)[VALID], np.asarray(logits)[VALID]) < 2e-6
    assert_same_states(state, end)


@slow
@pytest.mark.parametrize("name", SINGLE)
def test_variant_token_by_token_equals_parallel_with_resets_and_padding(name):
    model, params = made("rwkv4", **VARIANTS[name])
    unrolled, layers = make("rwkv4", scan=False, **VARIANTS[name]), unstack(params)
    logits, end = parallel(model, params)
    state, steps = unrolled.init_state(B), []
    for t in range(T):
        one = slice(t, t + 1)
        step, state = forward(unrolled, layers, IDS[:, one], state, RESET[:, one], VALID[:, one])
        steps.append(step)
    assert error_ratio(np.concatenate(steps, axis=1)[VALID], np.asarray(logits)[VALID]) < 2e-6
    assert_same_states(state, end)


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=slow) for name in SAME_AS])
def test_variant_equals_the_released_model_with_that_part_held(name):
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
    if "ln0/scale" in lacks:  # which leaves alone what it finds normed
        rows = flat["emb/embedding"] - flat["emb/embedding"].mean(1, keepdims=True)
        rows = rows * np.sqrt(np.float32(1 - 1e-5) / rows.var(1, keepdims=True))
        ones = np.ones(D, np.float32)
        merged |= {"emb/embedding": rows, "ln0/scale": ones, "ln0/bias": 0 * ones}
        params = params | {"emb": {"embedding": rows}}
    actual = logits_of(model, params)
    assert error_ratio(actual, logits_of(released, unflatten_dict(merged, sep="/"))) < 2e-6
    assert error_ratio(actual, logits_of(released, others)) > 1e-3


@pytest.mark.parametrize("scan", [True, False])
def test_fields_reach_the_layers_and_default_to_the_released_variant(scan):
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


@slow
def test_default_spelled_out_is_the_default_to_the_bit():
    model, params = made("rwkv4")
    spelled = make("rwkv4", token_shift=True, activation="relu2")
    np.testing.assert_array_equal(logits_of(model, params), logits_of(spelled, params))
    transformer, its = made("transformer")
    logits = [forward(model, its, IDS)[0] for model in (transformer, make("transformer", activation="gelu"))]
    np.testing.assert_array_equal(*logits)


def test_previous_token_decayed_once_is_a_bonus_less_the_decay():
    """Exponent (t - i) w in place of (t - 1 - i) w of Eq. 16, in float64 by the sum itself."""
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


def test_channel_mixing_applies_the_activation_of_the_variant():
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


@slow
def test_activations_change_the_logits():
    outputs = [logits_of(*made("rwkv4", **fields)) for fields in ({}, OTHERS["ReLU"], OTHERS["GELU"])]
    assert min(error_ratio(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_variant_holds_what_is_changed_and_fingerprints_tell_it():
    released, params = made("rwkv4")
    assert released.variant == make("rwkv4", token_shift=True, activation="relu2").variant == {}
    prints = {interop.fingerprint(released, params)}
    for fields in VARIANTS.values():
        model = make("rwkv4", **fields)
        assert model.variant == {name: value for name, value in fields.items() if name != "embedding_norm"}
        if fields.keys() <= {"activation", "current_token", "previous_token"}:  # no name or shape need tell
            prints.add(interop.fingerprint(model, params))
    assert len(prints) == 6  # the released model, plain, excluded, decayed, ReLU, GELU


@pytest.mark.parametrize("name", SINGLE)
def test_files_hold_a_variant_and_formats_of_the_released_model_refuse_it(tmp_path, name):
    model, params = made("rwkv4", **VARIANTS[name])
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


def test_tuned_state_without_token_shift_has_no_last_activations():
    model = make("rwkv4", token_shift=False)
    tuned = jax.eval_shape(lambda: methods.tuned_state(model, methods.untuned_state(model), B))
    assert jax.tree.structure(tuned) == jax.tree.structure(jax.eval_shape(lambda: model.init_state(B)))


def test_build_refuses_switches_of_another_kind_of_layer():
    with pytest.raises(ValueError, match="unknown model field 'receptance'"):
        make("transformer", receptance=False)
    with pytest.raises(ValueError, match=r"unknown switch of model.variant 'receptance': expected one of token_shift"):
        make("transformer", variant={"receptance": False})
    with pytest.raises(ValueError, match=r"unknown switch of model.variant 'shift_w': did you mean 'shift_v'"):
        make("rwkv4", variant={"shift_w": False})


@pytest.mark.parametrize("value", [1, "False", None])
def test_build_refuses_a_switch_of_another_type(value):
    with pytest.raises(ValueError, match=rf"model.variant.receptance is {value!r}, expected a bool"):
        make_variant(Variant, {"receptance": value})
    with pytest.raises(ValueError, match=r"unknown model.variant.current_token 'bonu': did you mean 'bonus'"):
        make_variant(Variant, {"current_token": "bonu"})
