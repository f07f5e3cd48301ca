"""A sequence split along time over devices is the same sequence: values, final state and all gradients."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from wkv4_formula import formula, past_of

from rwkv_jax.models.layers import token_shift
from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.ops.sequence import last_before, wkv4_sequence

P = jax.sharding.PartitionSpec
B, PART, D = 3, 5, 4
LAYOUTS = {
    "plain": None,
    # the first row has a document that begins within a part, one at its edge, and a part of nothing but padding
    "packed": ("..abcdefAbcde.....fghBcd..efgh", "abcdefghijABCDEfghijklmnopqrst", "." * 11 + "abcdefghijklmnopqrs"),
}


def masks_of(name, T):
    if LAYOUTS[name] is None:
        return {}
    letters = np.array([list((row * (T // len(row) + 1))[:T]) for row in LAYOUTS[name]])
    return {"reset_BT": np.char.isupper(letters), "valid_BT": letters != "."}


def mix(shift, wkv, weights, x_BTD, past, masks):
    """Token shift, projections and WKV, as in time mixing: (y, final state, last token)."""
    w_D, u_D, key_DD, value_DD = weights
    last_BD, state = past
    previous_BTD, last_BD = shift(x_BTD, last_BD, masks)
    k_BTD, v_BTD = previous_BTD @ key_DD, (x_BTD + previous_BTD) @ value_DD
    y_BTD, state = wkv(w_D, u_D, k_BTD, v_BTD, state, **masks)
    return y_BTD, state, last_BD


def whole_shift(x_BTD, last_BD, masks):
    return token_shift(x_BTD, last_BD, masks.get("reset_BT"), masks.get("valid_BT"))


def part_shift(x_BTD, last_BD, masks):
    last_BD, final_BD = last_before(x_BTD, last_BD, axis_name="time", valid_BT=masks.get("valid_BT"))
    return whole_shift(x_BTD, last_BD, masks)[0], final_BD


def in_parts(impl):
    """`mix` on all devices, each with its part of the time."""
    mesh = jax.make_mesh((jax.device_count(),), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    in_time = P(None, "time")
    return jax.shard_map(
        partial(mix, part_shift, partial(wkv4_sequence, axis_name="time", impl=impl)),
        mesh=mesh,
        in_specs=(P(), in_time, P(), in_time),
        out_specs=(in_time, P(), P()),
        check_vma=False,
    )


def inputs(layout):
    """(weights, x, past, masks), and cotangents of y."""
    T, rng = PART * jax.device_count(), np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    weights = (np.array([-1e-3, -0.5, -30, -np.inf]), draw(D), draw(D, D), draw(D, D))
    past = (draw(B, D), WKV4State(draw(B, D), 1 + draw(B, D) ** 2, draw(B, D)))
    x_BTD, dy_BTD, masks = draw(B, T, D), draw(B, T, D), masks_of(layout, T)
    if masks:
        dy_BTD = dy_BTD * masks["valid_BT"][..., None]
    return (weights, x_BTD, past, masks), dy_BTD


def test_wkv4_sequence_without_masks_follows_eq_16(x64):
    (weights, x_BTD, past, masks), dy_BTD = inputs("plain")
    y_BTD, state, last_BD = jax.jit(in_parts("scan"))(weights, x_BTD, past, masks)
    w_D, u_D, key_DD, value_DD = weights
    previous_BTD = np.concatenate([past[0][:, None], x_BTD[:, :-1]], axis=1)
    want = formula(w_D, u_D, previous_BTD @ key_DD, (x_BTD + previous_BTD) @ value_DD, past_of(past[1]), dy_BTD)
    np.testing.assert_array_equal(last_BD, x_BTD[:, -1])
    for actual, name in ((y_BTD, "y"), *zip(past_of(state), ("mean", "log_weight"), strict=True)):
        assert error_ratio(actual, want[name].value) < 1e-12


@pytest.mark.parametrize(
    ("layout", "impl"),
    [
        ("packed", "scan"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (("packed", "associative"), ("plain", "scan"), ("plain", "associative"))
        ),
    ],
)
def test_wkv4_sequence_in_parts_equals_one_device(x64, layout, impl):
    """Outputs, final state and all gradients."""
    (weights, x_BTD, past, masks), dy_BTD = inputs(layout)
    whole = partial(mix, whole_shift, partial(wkv4, impl=impl))

    def run(mix):
        def loss(weights, x_BTD, past):
            y_BTD, state, last_BD = mix(weights, x_BTD, past, masks)
            after = wkv4(*weights[:2], x_BTD[:, :2], x_BTD[:, 2:4], state)[0]  # the state counts as what it leads to
            mean = state.num / state.den, jnp.log(state.den) + state.log_scale
            return (y_BTD * dy_BTD).sum() + after.sum() + (last_BD * dy_BTD[:, 0]).sum(), (y_BTD, mean, last_BD)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(weights, x_BTD, past)

    for a, b in zip(jax.tree.leaves(run(in_parts(impl))), jax.tree.leaves(run(whole)), strict=True):
        assert error_ratio(a, b) < 1e-12


@pytest.mark.slow
def test_wkv4_sequence_on_eight_devices_equals_one():
    test = f"{__file__}::{test_wkv4_sequence_in_parts_equals_one_device.__name__}"
    code = f"import pytest; code = pytest.main([{test!r}]); import jax; assert jax.device_count() == 8; exit(code)"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}  # comes after conftest's, and wins
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
