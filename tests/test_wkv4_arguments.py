"""Which form `ops.wkv4` takes, and what it says of arguments that do not fit."""

import jax
import numpy as np
import pytest

from rwkv_jax.ops import WKV4State, wkv4

ROWS, D = 4, 6


def arguments(T):
    tokens = np.zeros((ROWS, T, D), np.float32)
    return -np.ones(D, np.float32), np.zeros(D, np.float32), tokens, tokens, WKV4State.empty(ROWS, D)


def test_no_form_named_is_the_scan_on_a_cpu_and_the_associative_scan_on_accelerators():
    """Decided when lowering: compiling for a TPU on a CPU must give the TPU's program."""
    w, u, k, v, state = arguments(20)
    loops = {
        platform: jax.jit(wkv4)
        .trace(w, u, k, v, state)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops["cpu"] > 0 and loops["cuda"] == loops["tpu"] == 0
    decode = jax.jit(wkv4).trace(w, u, k[:, :1], v[:, :1], state).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.case" not in decode


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
