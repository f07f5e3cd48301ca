"""The GPU kernels: interpreted on a CPU, and lowered and compiled for a GPU that is not here.

conftest.py keeps tests off accelerators. On a machine with a GPU, `python -m pytest --noconftest
tests/ops/test_wkv4_gpu.py -m ""` judges the compiled kernels instead of interpreted ones.
"""

import functools
import importlib.util
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from wkv4_cases import LAYOUTS, ROWS, case, check_case, check_packed, empty, packed_case
from wkv4_forms import budget, check, spread_and_largest
from wkv4_formula import Sized, formula, past_of

from rwkv_jax.ops import WKV4State
from rwkv_jax.ops.kernels import wkv4_gpu

ON_GPU = jax.default_backend() == "gpu"
computed = pytest.mark.skipif(
    not ON_GPU and not hasattr(plgpu, "InterpretGPUParams"),
    reason="no GPU, and jax before 0.11 has no public interpreter of GPU kernels",
)


@functools.partial(jax.jit, static_argnames=("interpret",))
def run(w, u, k, v, state, dy, dnum=None, dden=None, reset_BT=None, valid_BT=None, interpret=not ON_GPU):
    """(outputs, final state, gradients of w, u, k, v, num and den of the incoming state) of sum(dy * y)."""
    inputs = (w[None], u[None], k, v)
    y, after, starts = wkv4_gpu.forward(*inputs, state, reset_BT, valid_BT, interpret=interpret)
    dnum, dden = (jnp.zeros_like(after.num) if x is None else x for x in (dnum, dden))
    dy = dy.astype(y.dtype)
    dw, du, dk, dv, dstate = wkv4_gpu.backward(
        *inputs, starts, reset_BT, valid_BT, dy, (dnum, dden), interpret=interpret
    )
    return y, after, (dw.sum(0), du.sum(0), dk, dv, dstate)


def with_log_scale(state, grads):
    """Gradients with the incoming state's as a `WKV4State`: log_scale multiplies num and den by its exponential."""
    *others, (dnum, dden) = grads
    return (*others, WKV4State(dnum, dden, state.num * dnum + state.den * dden))


# --------------------------------------------------------------------------------------------- numerics


# Less than a block of 16 tokens, one exactly, some, and more than are fetched ahead.
@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 16, 17, 200])
@computed
def test_wkv4_gpu_follows_eq_16(T):
    inputs = case(T)
    y, after, grads = run(*inputs)
    check_case(y, after, with_log_scale(inputs.state, grads), T)


@computed
def test_wkv4_gpu_follows_eq_16_in_packed_and_padded_rows():
    layouts = LAYOUTS if ON_GPU else LAYOUTS[1:5]  # the interpreter takes its time for each row
    inputs, masks, allowed = packed_case(20, layouts)
    inputs.dy[~masks["valid_BT"]] = 0  # which `ops.wkv4` does before it calls the kernel
    y, after, grads = run(*inputs, **masks)
    check_packed(y, after, with_log_scale(inputs.state, grads), inputs, masks, allowed)


@computed
@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="a GPU has these errors itself")
@pytest.mark.parametrize("sign", [-1, 1])
def test_wkv4_gpu_approximations_of_the_hardware_stay_within_the_budget(monkeypatch, sign):
    """ex2.approx.ftz of x log2(e) and rsqrt.approx, always off by what is taken as their largest error."""
    exp2, rsqrt = jnp.exp2, jax.lax.rsqrt
    off = lambda x, error: x * np.float32(1 + sign * error)
    monkeypatch.setattr(jnp, "exp", lambda x: off(exp2(x * np.float32(np.log2(np.e))), 2**-22.5))
    monkeypatch.setattr(jax.lax, "rsqrt", lambda x: off(rsqrt(x), 2**-22.9))
    jax.clear_caches()
    try:
        inputs = case(300)
        y, after, grads = run(*inputs)
        check_case(y, after, with_log_scale(inputs[4], grads), 300)
    finally:
        jax.clear_caches()


@computed
@pytest.mark.slow
def test_wkv4_gpu_accumulates_bfloat16_in_float32():
    w, u, k, v, state, dy = case(20)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in (k, v))
    dy = dy.astype(jnp.bfloat16).astype(np.float32)
    y, after, (dw, du, dk, dv, dstate) = run(w, u, k, v, state, dy)
    assert {y.dtype, dk.dtype, dv.dtype} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in (dw, du, *after, *dstate)} == {jnp.dtype("float32")}
    want = formula(w, u, k, v, past_of(state), dy)
    allowed = budget(np.float32, 20, *spread_and_largest(u, np.float32(k), state))
    check(past_of(after).mean, want["mean"], allowed)
    check(dw, Sized(want["w"].value.sum(0), want["w"].magnitude.sum(0)), allowed.max())
    for actual, name in ((y, "y"), (dk, "k"), (dv, "v")):  # rounded to bfloat16 once, at the end
        error = np.abs(np.float64(actual) - want[name].value)
        before_rounding = allowed[..., None] * want[name].magnitude + np.finfo(np.float32).tiny
        half = jnp.finfo(jnp.bfloat16).eps / 2 * np.abs(want[name].value)
        assert (error <= half + (1 + 2**-7) * before_rounding).all(), name


@computed
@pytest.mark.slow
def test_wkv4_gpu_passes_states_and_cotangents_through_padding_unchanged():
    w, u, k, v, state, dy = case(20)
    dnum, dden = dy[:, 0], dy[:, 1]
    nothing = {"reset_BT": np.ones((ROWS, 20), bool), "valid_BT": np.zeros((ROWS, 20), bool)}
    for before in (state, empty(ROWS)):
        _, after, grads = run(w, u, k, v, before, 0 * dy, dnum, dden, **nothing)
        jax.tree.map(np.testing.assert_array_equal, (after, grads[4]), (before, (dnum, dden)))
        assert not any(np.any(x) for x in grads[:4])


@computed
@pytest.mark.slow
def test_wkv4_gpu_two_calls_equal_one():
    """The cotangents of the state between two calls carry the whole gradient of the first."""
    w, u, k, v, state, dy = case(20)
    y1, between, _ = run(w, u, k[:, :7], v[:, :7], state, dy[:, :7])
    y2, after, (dw2, du2, dk2, dv2, d) = run(w, u, k[:, 7:], v[:, 7:], between, dy[:, 7:])
    _, _, (dw1, du1, dk1, dv1, dstate) = run(w, u, k[:, :7], v[:, :7], state, dy[:, :7], *d)
    y, dk, dv = (np.concatenate(x, axis=1) for x in ((y1, y2), (dk1, dk2), (dv1, dv2)))
    grads = with_log_scale(state, (dw1 + dw2, du1 + du2, dk, dv, dstate))
    check_case(y, after, grads, 20)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_wkv4_gpu_computes_every_block_of_channels_alike():
    """1,000 tokens of 300 channels, each a copy of one that the formula judges."""
    inputs, copies = case(1000), 50
    results = jax.tree.map(np.asarray, run(*jax.tree.map(lambda x: np.tile(x, copies), inputs)))
    first = jax.tree.map(lambda x: x[..., : x.shape[-1] // copies], results)
    jax.tree.map(lambda x, one: np.testing.assert_array_equal(x, np.tile(one, copies)), results, first)
    y, after, grads = first
    check_case(y, after, with_log_scale(inputs[4], grads), 1000)


# ------------------------------------------------------------------------------ for a GPU that is not here


def shapes(direction, B, T, D, dtype, masks, sharding=None):
    """What `forward` or `backward` takes."""
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
        ("bfloat16", (2, 64, 256), True),
        ("bfloat16", (1, 33, 200), True),
        ("float32", (3, 5, 7), False),
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


def test_wkv4_gpu_refuses_float64(x64):
    with pytest.raises(ValueError, match="does not take float64"):
        jax.eval_shape(wkv4_gpu.forward, *shapes("forward", 1, 16, 128, "float64", False))


HOPPER = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 clock_rate_ghz: 1.98 fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None,
    reason="needs jax[cuda13] and the ptxas of a CUDA toolkit on PATH, but no GPU",
)
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_wkv4_gpu_compiles_for_hopper_without_spilling(direction, dtype, masks, tmp_path, monkeypatch):
    for name, value in {"DUMP_TO": str(tmp_path), "DUMP_PTXAS": "1"}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_{name}", value)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=HOPPER
    )
    on = jax.sharding.SingleDeviceSharding(topology.devices[0])
    compiled = (
        jax.jit(getattr(wkv4_gpu, direction)).lower(*shapes(direction, 8, 4096, 4096, dtype, masks, on)).compile()
    )
    assert " while(" not in compiled.as_text()
    (report,) = tmp_path.glob("*.ptxas")
    registers, spilled = (int(re.search(x, report.read_text())[1]) for x in (r"Used (\d+)", r"(\d+) bytes spill st"))
    assert spilled == 0
    assert registers <= 255  # two of 128 threads share the 65,536 registers of a processor
