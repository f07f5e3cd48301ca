"""The form that `ops.wkv4` takes, by name or by platform, and its errors for arguments that do not fit."""

import functools
import importlib
import types

import jax
import numpy as np
import pytest

from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.ops.dispatch import cuda_capability, target_platform
from rwkv_jax.ops.wkv4 import FORMS

ROWS, D = 4, 6
OPERATOR = importlib.import_module("rwkv_jax.ops.wkv4")  # the package's attribute of this name is the function


def arguments(T, dtype=np.float32):
    tokens, row = np.zeros((ROWS, T, D), dtype), np.zeros((ROWS, D), dtype)
    return -np.ones(D, dtype), np.zeros(D, dtype), tokens, tokens, WKV4State(row, row, row - 1e38)


@pytest.fixture
def chosen(monkeypatch):
    """The form that a call takes, without computing it."""
    monkeypatch.setattr(OPERATOR, "_applied", lambda impl, *operands: impl)
    return lambda T=20, dtype=np.float32, impl=None: wkv4(*arguments(T, dtype), impl=impl)


@pytest.fixture
def machine(monkeypatch):
    """Sets JAX's default backend and devices to those of another machine."""

    def pretend(platform, capability=None):
        device = types.SimpleNamespace(platform=platform)
        if capability:
            device.compute_capability = capability
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        cuda_capability.cache_clear()

    yield pretend
    cuda_capability.cache_clear()


def mesh_of(platform):
    """The result of `jax.sharding.get_abstract_mesh` under `jax.set_mesh` of such devices."""
    return lambda: types.SimpleNamespace(abstract_device=types.SimpleNamespace(platform=platform))


def test_target_platform_is_of_the_mesh_then_default_device_then_backend(machine, monkeypatch):
    cpu, mesh = jax.devices("cpu")[0], jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert target_platform() == "cpu"
    machine("tpu")
    assert target_platform() == "tpu"
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            assert target_platform() == "cpu"
    with jax.set_mesh(mesh):
        assert target_platform() == "cpu"
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", mesh_of("gpu"))
    with jax.default_device(cpu):
        assert target_platform() == "gpu"


@pytest.mark.parametrize(
    ("platform", "capability", "form"),
    [
        ("cpu", None, "scan"),
        ("tpu", None, "tpu"),
        ("gpu", "9.0", "gpu"),
        ("gpu", "12.0", "gpu"),
        ("gpu", "8.0", "associative"),
        ("gpu", "gfx942", "associative"),  # an AMD GPU
        ("metal", None, "associative"),
    ],
)
def test_wkv4_takes_the_named_form_or_that_for_platform_T_and_dtype(chosen, machine, x64, platform, capability, form):
    machine(platform, capability)
    assert chosen() == form and chosen(T=1) == "scan"
    assert chosen(dtype=np.float64) == ("associative" if form == "gpu" else form)
    assert all(chosen(T=T, impl=named) == named for named in FORMS for T in (1, 20))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_wkv4_computes_on_the_cpu_of_a_machine_with_an_accelerator(machine, platform):
    on_the_cpu = jax.device_put(arguments(18), jax.devices("cpu")[0])
    machine(platform, "9.0" if platform == "gpu" else None)
    found, wanted = wkv4(*on_the_cpu), wkv4(*on_the_cpu, impl="scan")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_wkv4_without_a_named_form_traces_the_program_of_the_form_itself():
    trace = lambda impl: str(jax.make_jaxpr(functools.partial(wkv4, impl=impl))(*arguments(20)))
    assert trace(None) == trace("scan") != trace("associative")


def test_wkv4_without_a_named_form_is_lowered_to_the_kernel_on_a_tpu(machine):
    machine("tpu")
    text = jax.jit(lambda *args: wkv4(*args)).trace(*arguments(20)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @tpu_custom_call") == 1 and "stablehlo.while" not in text


def test_wkv4_kernel_by_name_is_chosen_at_lowering(monkeypatch, x64):
    """On any machine each platform gets its own kernel, and a CPU the interpreter."""
    asked = []
    forms = lambda kernels: {platform: kernel.args[0] for platform, kernel in kernels.items()}
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, **kernels: asked.append(forms(kernels)))
    for dtype in (np.float32, np.float64):
        OPERATOR._applied.__wrapped__("pallas", *arguments(20, dtype), None, None)
    kernels = {"cpu": "interpreted", "tpu": "tpu"}
    assert asked == [kernels | {"cuda": "gpu"}, kernels]  # the kernel for GPUs computes in float32 alone


def test_wkv4_kernel_by_name_refuses_float64_on_a_gpu(machine, x64):
    machine("gpu", "9.0")
    with pytest.raises(ValueError, match="on a GPU, whose kernel has no float64"):
        jax.eval_shape(functools.partial(wkv4, impl="pallas"), *arguments(20, np.float64))


@pytest.mark.slow
def test_wkv4_kernel_by_name_is_lowered_to_that_of_each_platform():
    traced = jax.jit(functools.partial(wkv4, impl="pallas")).trace(*arguments(20))
    for platform, kernel in (("tpu", "tpu_custom_call"), ("cuda", "mosaic_gpu")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count(f"custom_call @{kernel}") == 1 and "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"impl": "cuda"}, "impl is 'cuda', expected None or one of scan, associative, pallas"),
        ({"w_D": np.zeros(5)}, r"w is \(5,\), expected \(6,\)"),
        ({"v_BTD": np.zeros((4, 15, 6))}, r"k and v are \(4, 16, 6\) and \(4, 15, 6\), expected one shape"),
        ({"state": WKV4State(*np.zeros((3, 1, 6)))}, r"state.num is \(1, 6\), expected \(4, 6\)"),
        ({"state": tuple(np.zeros((3, 1, 6)))}, r"state.num is \(1, 6\), expected \(4, 6\)"),
        ({"valid_BT": np.zeros((16, 4), bool)}, r"valid_BT is \(16, 4\), expected \(4, 16\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wkv4_names_an_argument_that_does_not_fit(change, line):
    w, u, k, v, state = arguments(16)
    with pytest.raises(ValueError, match=f"^{line}"):
        wkv4(**({"w_D": w, "u_D": u, "k_BTD": k, "v_BTD": v, "state": state} | change))
