"""Which form `ops.wkv4` takes, and what it says of arguments that do not fit."""

import functools
import types

import jax
import numpy as np
import pytest

from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.ops.kernels import hopper_at_hand

ROWS, D = 4, 6


def arguments(T):
    tokens = np.zeros((ROWS, T, D), np.float32)
    return -np.ones(D, np.float32), np.zeros(D, np.float32), tokens, tokens, WKV4State.empty(ROWS, D)


def test_no_form_named_is_decided_for_the_platform_that_is_compiled_for():
    """Compiling for a TPU on a CPU must give the TPU's program."""
    w, u, k, v, state = arguments(20)
    traced, one_token = jax.jit(wkv4).trace(w, u, k, v, state), jax.jit(wkv4).trace(w, u, k[:, :1], v[:, :1], state)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    loops, kernels = ({p: t.count(what) for p, t in text.items()} for what in ("stablehlo.while", "tpu_custom_call"))
    assert loops["cpu"] > 0 and loops["cuda"] == loops["tpu"] == 0
    assert kernels == {"cpu": 0, "cuda": 0, "tpu": 1}
    decode = one_token.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.case" not in decode and "tpu_custom_call" not in decode


@pytest.mark.parametrize(("capability", "chosen"), [("9.0", 1), ("12.0", 1), ("8.0", 0), ("gfx942", 0)])
def test_a_hopper_gpu_gets_the_kernel_and_others_do_not(capability, chosen, monkeypatch):
    """GPUs that are not here, by what JAX says of theirs."""
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    hopper_at_hand.cache_clear()
    try:
        assert hopper_at_hand() == chosen
        if capability in ("9.0", "8.0"):
            traced = jax.jit(lambda *operands: wkv4(*operands)).trace(*arguments(20))
            assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == chosen
    finally:
        hopper_at_hand.cache_clear()


def test_the_kernel_by_name_is_the_platform_s_own():
    traced = jax.jit(functools.partial(wkv4, impl="pallas")).trace(*arguments(20))
    for platform, kernel in (("tpu", "tpu_custom_call"), ("cuda", "mosaic_gpu")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count(f"custom_call @{kernel}") == 1 and "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"impl": "cuda"}, "impl is 'cuda', expected None or one of scan, associative, pallas"),
        ({"w_D": np.zeros(5)}, r"w is \(5,\), expected \(6,\)"),
        ({"u_D": np.zeros((1, 6))}, r"u is \(1, 6\), expected \(6,\)"),
        ({"v_BTD": np.zeros((4, 15, 6))}, r"k and v are \(4, 16, 6\) and \(4, 15, 6\), expected one shape"),
        ({"state": WKV4State.empty(1, 6)}, r"state.num is \(1, 6\), expected \(4, 6\)"),
        ({"reset_BT": np.zeros((4, 1), bool)}, r"reset_BT is \(4, 1\), expected \(4, 16\)"),
        ({"valid_BT": np.zeros((16, 4), bool)}, r"valid_BT is \(16, 4\), expected \(4, 16\)"),
    ],
    ids=str,
)
def test_wrong_input_is_named(change, line):
    w, u, k, v, state = arguments(16)
    with pytest.raises(ValueError, match=f"^{line}"):
        wkv4(**({"w_D": w, "u_D": u, "k_BTD": k, "v_BTD": v, "state": state} | change))
