"""The GPU kernels: interpreted on a CPU, and lowered for a GPU that is not attached.

conftest.py keeps tests off accelerators. On a machine with a GPU, `python -m pytest --noconftest
tests/ops/test_wkv4_gpu.py -m ""` judges the compiled kernels instead of interpreted ones.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from operators import run
from wkv4_cases import case, check_bfloat16, check_case, check_random, in_bfloat16, random_case

from rwkv_jax.ops import WKV4State
from rwkv_jax.ops.kernels import wkv4_gpu

OPERATOR = importlib.import_module("rwkv_jax.ops.wkv4")  # the package's attribute of this name is the function
ON_GPU = jax.default_backend() == "gpu"
needs_jax_0_11 = pytest.mark.skipif(
    not ON_GPU and not hasattr(plgpu, "InterpretGPUParams"),
    reason="no GPU, and jax before 0.11 has no public interpreter of GPU kernels",
)


def computed(test):
    return needs_jax_0_11(pytest.mark.usefixtures("interpreted")(test))


@pytest.fixture
def interpreted(monkeypatch):
    if not ON_GPU:
        for name in ("forward", "backward"):
            monkeypatch.setattr(wkv4_gpu, name, functools.partial(getattr(wkv4_gpu, name), interpret=True))


def wkv4(w_D, u_D, k_BTD, v_BTD, state, *, impl, reset_BT=None, valid_BT=None):
    """`ops.wkv4` by the kernel alone, interpreted on machines without a GPU."""
    reset_BT = None if reset_BT is None else reset_BT & valid_BT
    return OPERATOR._wkv4(impl, w_D[None], u_D[None], k_BTD, v_BTD, state, reset_BT, valid_BT)


# --------------------------------------------------------------------------------------------- numerics


@computed
@pytest.mark.parametrize("seed", range(4))
def test_wkv4_gpu_follows_eq_16_in_packed_and_padded_rows(seed):
    inputs, masks = random_case(seed, 23, B=32 if ON_GPU else 16)  # the interpreter is slow in each row
    check_random(*run(wkv4, "gpu", (20, 3), *inputs, masks), inputs, masks, 23)


# Less than a block of 16 tokens, one exactly, some, and more than are fetched ahead.
@computed
@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 16, 17, 200])
def test_wkv4_gpu_follows_eq_16_at_any_length(T):
    inputs = case(T + 3)
    check_case(*run(wkv4, "gpu", (T, 3), *inputs), inputs)


@computed
@pytest.mark.slow
def test_wkv4_gpu_accumulates_bfloat16_in_float32():
    inputs = in_bfloat16(case(20))
    check_bfloat16(*run(wkv4, "gpu", (17, 3), *inputs), inputs)


@computed
@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="a GPU has these errors itself")
@pytest.mark.parametrize("sign", [-1, 1])
def test_wkv4_gpu_stays_within_the_budget_under_hardware_approximations(monkeypatch, sign):
    """Replaces exp and rsqrt by ex2.approx.ftz of x log2(e) and rsqrt.approx, always off by their largest assumed
    error."""
    exp2, rsqrt = jnp.exp2, jax.lax.rsqrt
    off = lambda x, error: x * np.float32(1 + sign * error)
    monkeypatch.setattr(jnp, "exp", lambda x: off(exp2(x * np.float32(np.log2(np.e))), 2**-22.5))
    monkeypatch.setattr(jax.lax, "rsqrt", lambda x: off(rsqrt(x), 2**-22.9))
    jax.clear_caches()
    try:
        inputs = case(300)
        check_case(*run(wkv4, "gpu", (300,), *inputs), inputs)
    finally:
        jax.clear_caches()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_wkv4_gpu_computes_every_block_of_channels_alike():
    """1,000 tokens of 300 channels, each a copy of one that is compared with the formula."""
    inputs, copies = case(1000), 50
    results = jax.tree.map(np.asarray, run(wkv4, "gpu", (1000,), *jax.tree.map(lambda x: np.tile(x, copies), inputs)))
    first = jax.tree.map(lambda x: x[..., : x.shape[-1] // copies], results)
    jax.tree.map(lambda x, one: np.testing.assert_array_equal(x, np.tile(one, copies)), results, first)
    check_case(*first, inputs)


# ------------------------------------------------------------------------------ for a GPU that is not here


def shapes(direction, B, T, D, dtype, masks, sharding=None):
    """Shapes of the arguments of `forward` or `backward`."""
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    vector, tokens, state = array(1, D), array(B, T, D, dtype=dtype), array(B, D)
    mask = array(B, T, dtype=bool) if masks else None
    if direction == "forward":
        return vector, vector, tokens, tokens, WKV4State(state, state, state), mask, mask
    starts = jax.eval_shape(wkv4_gpu.forward, *shapes("forward", B, T, D, dtype, masks))[2]
    starts = array(*starts.shape, dtype=starts.dtype)
    return vector, vector, tokens, tokens, starts, mask, mask, tokens, (state, state)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("dtype", "shape", "masks"),
    [
        ("float32", (2, 64, 256), False),
        ("bfloat16", (1, 33, 200), True),
    ],
    ids=str,
)
@pytest.mark.slow
def test_wkv4_gpu_is_lowered_to_one_kernel(direction, dtype, shape, masks):
    function = jax.jit(getattr(wkv4_gpu, direction))
    lowered = function.trace(*shapes(direction, *shape, dtype, masks)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "while" not in text  # no loop over tokens outside of the kernel
