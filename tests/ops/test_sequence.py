"""A sequence split along time over devices equals the whole sequence: values, final state and all gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from operators import masks_of

from rwkv_jax.models.layers import token_shift
from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.ops.sequence import last_before, wkv4_sequence

P = jax.sharding.PartitionSpec
B, D, DEVICES, PART = 3, 4, 4, 5
T = DEVICES * PART
LAYOUTS = {
    "plain": {},
    # the first row has a document that begins within a part, one at its edge, and a part of nothing but padding
    "packed": masks_of(("..abcdefAbcde.....fg", "abcdefghijABCDEfghij", "." * 11 + "abcdefghi")),
}


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
    mesh = jax.make_mesh((DEVICES,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    in_time = P(None, "time")
    return jax.shard_map(
        partial(mix, part_shift, partial(wkv4_sequence, axis_name="time", impl=impl)),
        mesh=mesh,
        in_specs=(P(), in_time, P(), in_time),
        out_specs=(in_time, P(), P()),
        check_vma=False,
    )


@pytest.mark.parametrize(
    ("layout", "impl"),
    [
        ("packed", "scan"),
        pytest.param("packed", "associative", marks=pytest.mark.slow),
        pytest.param("plain", "scan", marks=pytest.mark.slow),
    ],
)
def test_wkv4_sequence_in_parts_equals_one_device(x64, layout, impl):
    """Compares outputs, final state and all gradients."""
    rng, masks = np.random.default_rng(0), LAYOUTS[layout]
    draw = lambda *shape: rng.standard_normal(shape)
    weights = (np.array([-1e-3, -0.5, -30, -np.inf]), draw(D), draw(D, D), draw(D, D))
    past = (draw(B, D), WKV4State(draw(B, D), 1 + draw(B, D) ** 2, draw(B, D)))
    x_BTD, dy_BTD = draw(B, T, D), draw(B, T, D)
    if masks:
        dy_BTD = dy_BTD * masks["valid_BT"][..., None]

    def run(mix):
        def loss(weights, x_BTD, past):
            y_BTD, state, last_BD = mix(weights, x_BTD, past, masks)
            after = wkv4(*weights[:2], x_BTD[:, :2], x_BTD[:, 2:4], state)[0]  # judges the state by later outputs
            mean = state.num / state.den, jnp.log(state.den) + state.log_scale
            return (y_BTD * dy_BTD).sum() + after.sum() + (last_BD * dy_BTD[:, 0]).sum(), (y_BTD, mean, last_BD)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(weights, x_BTD, past)

    found, wanted = run(in_parts(impl)), run(partial(mix, whole_shift, partial(wkv4, impl=impl)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error_ratio(a, b) < 1e-12
