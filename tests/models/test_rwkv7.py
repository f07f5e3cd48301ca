"""Ablation switches of RWKV-7: each changes its part alone, in every form of the computation; keys of length 1."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from judge import assert_same, error_ratio
from small import D, L, forward, made, make, token_by_token, tokens

import rwkv_jax
from rwkv_jax import generate, hardware
from rwkv_jax.models.rwkv7 import unit

B, T = 2, 6
# For every part: the parameters that a model without it lacks, and their values with which the released model is
# the same.
WITHOUT = {
    "in_context_rate": {"a0": 100, "a1": 0, "a2": 0, "k_a": 0},
    "value_residual": {"v0": -100, "v1": 0, "v2": 0},
    "bonus": {"r_k": 0},
    "token_shift": dict.fromkeys(("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"), 0),
}
ALL = dict.fromkeys(WITHOUT, False) | {"removal": 2.0}
IDS, RNG = tokens(B, T), np.random.default_rng(1)
RESET, VALID = RNG.random((B, T)) < 0.3, RNG.random((B, T)) < 0.7


def parallel(model, params):
    """(logits, state after the last token) from an empty past, by one program for each model."""
    return forward(model, params, IDS, model.init_state(B), RESET, VALID)


@pytest.mark.parametrize("part", WITHOUT)
def test_rwkv7_variant_equals_the_released_model_with_its_part_held(part):
    model, params = made("rwkv7", **{part: False})
    released, others = made("rwkv7")
    flat, held = flatten_dict(params), WITHOUT[part]
    lacks = flatten_dict(others).keys() - flat.keys()
    assert {path[-1] for path in lacks} == held.keys() and flat.keys() <= flatten_dict(others).keys()
    merged = {p: np.full_like(x, held[p[-1]]) if p in lacks else flat[p] for p, x in flatten_dict(others).items()}
    logits = lambda *its: np.asarray(parallel(*its)[0])[VALID]
    assert error_ratio(logits(model, params), logits(released, unflatten_dict(merged))) < 2e-6
    assert error_ratio(logits(model, params), logits(released, others)) > 1e-3


def test_rwkv7_removal_multiplies_the_part_that_the_key_removes():
    """With k_a and the low-rank map of a at 0, a is the sigmoid of a0 and affects the removal alone."""
    _, params = made("rwkv7")

    def logits(removal, rate):
        given = {"k_a": 0, "a1": 0, "a0": np.log(rate / (1 - rate))}
        put = lambda path, x: np.full_like(x, given[path[-1].key]) if path[-1].key in given else x
        held = jax.tree_util.tree_map_with_path(put, params)
        return np.asarray(parallel(make("rwkv7", removal=removal), held)[0])[VALID]

    assert error_ratio(logits(2.0, 0.3), logits(1.0, 0.6)) < 1e-6
    assert error_ratio(logits(2.0, 0.3), logits(1.0, 0.3)) > 1e-3
    assert error_ratio(logits(0.0, 0.3), logits(1.0, 1e-9)) < 1e-6  # nothing is removed, for any key


def test_rwkv7_variant_state_carries_over_tokens_resets_and_padding():
    model, params = made("rwkv7", **ALL)
    logits, end = parallel(model, params)
    steps, state = token_by_token(model, params, IDS, RESET, VALID)
    assert error_ratio(steps[VALID], np.asarray(logits)[VALID]) < 2e-6
    assert_same(state, end)


def test_rwkv7_variant_generates_the_tokens_that_its_parallel_form_predicts():
    model, params = made("rwkv7", **ALL)
    new = generate.generate(model, params, IDS[0, :3], max_new_tokens=T - 3, temperature=0, stop_tokens=())
    ids = np.int32([[*IDS[0, :3], *new]] * B)
    logits, _ = forward(model, params, ids, model.init_state(B), np.zeros_like(RESET), np.ones_like(VALID))
    assert np.argmax(logits[0, 2:-1], axis=-1).tolist() == new


@pytest.mark.parametrize(("part", "rank"), [("in_context_rate", 1), ("value_residual", 2)])
def test_rwkv7_flops_of_a_variant_leave_out_its_removed_matrices(part, rank):
    """6 FLOPs for each weight; those of v1 and v2 count in the first layer, too, which has none."""
    flops = lambda **fields: hardware.flops_per_token(make("rwkv7", low_ranks=(3, 5, 7, 2), **fields), T)
    assert flops() - flops(**{part: False}) == 6 * L * 2 * D * (3, 5, 7, 2)[rank]


def test_save_keeps_an_rwkv7_variant_or_refuses_it_in_released_formats(tmp_path):
    for fields in ({"removal": 0.0}, *({part: False} for part in WITHOUT)):
        model = make("rwkv7", **fields)
        assert model.variant == fields
        for file, format in (("a.pth", None), ("folder", None), ("a.bin", "rwkv.cpp")):
            named = f"holds released models only, and this one has {next(iter(fields))}="
            with pytest.raises(ValueError, match=named):
                rwkv_jax.save(tmp_path / file, *made("rwkv7", **fields), format)
            assert not list(tmp_path.iterdir())
    model, params = made("rwkv7", **ALL)
    rwkv_jax.save(tmp_path / "a.safetensors", model, params)
    again, read = rwkv_jax.load(tmp_path / "a.safetensors")
    assert again == model and again.variant == ALL
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_rwkv7_unit_has_length_1_and_a_finite_gradient_for_a_zero_key():
    x = np.random.default_rng(0).standard_normal((1, 1, 3, 4), np.float32)
    x[0, 0, 0] = 0
    found, gradient = jax.device_get(jax.jit(lambda x: (unit(x), jax.grad(lambda x: unit(x).sum())(x)))(x))
    np.testing.assert_allclose(np.linalg.norm(found[0, 0], axis=-1), [0, 1, 1], rtol=1e-6)
    assert np.isfinite(gradient).all()
