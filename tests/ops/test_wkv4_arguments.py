"""The form that `ops.wkv4` takes, by name or by platform, and what it says of arguments that do not fit."""

import functools
import importlib
import types

import jax
import numpy as np
import pytest

from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.ops.dispatch import hopper_at_hand, target_platform
from rwkv_jax.ops.wkv4 import FORMS

ROWS, D = 4, 6
OPERATOR = importlib.import_module("rwkv_jax.ops.wkv4")  # the package's attribute of this name is the function


def arguments(T, dtype=np.float32):
    tokens, row = np.zeros((ROWS, T, D), dtype), np.zeros((ROWS, D), dtype)
    return -np.ones(D, dtype), np.zeros(D, dtype), tokens, tokens, WKV4State(row, row, row - 1e38)


@pytest.fixture
def chosen(monkeypatch):
    """The form that a call without `impl` asks for, without computing anything."""
    monkeypatch.setattr(OPERATOR, "_applied", lambda impl, *operands: impl)
    return lambda T=20, dtype=np.float32: wkv4(*arguments(T, dtype))


@pytest.fixture
def machine(monkeypatch):
    """JAX's default backend and devices, as they would be on another machine."""

    def pretend(platform, capability=None):
        device = types.SimpleNamespace(platform=platform)
        if capability:
            device.compute_capability = capability
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        hopper_at_hand.cache_clear()

    yield pretend
    hopper_at_hand.cache_clear()


def mesh_of(platform):
    """What `jax.sharding.get_abstract_mesh` returns under `jax.set_mesh` of such devices."""
    return lambda: types.SimpleNamespace(abstract_device=types.SimpleNamespace(platform=platform))


def test_target_platform_is_that_of_the_mesh_then_of_the_default_device_then_of_the_backend(machine, monkeypatch):
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


def test_wkv4_without_a_named_form_takes_that_of_the_target_platform(chosen, machine, monkeypatch):
    cpu = jax.devices("cpu")[0]
    assert chosen() == "scan"
    machine("tpu")
    assert chosen() == "tpu"
    with jax.default_device(cpu):
        assert chosen() == "scan"
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", mesh_of("cpu"))
    assert chosen() == "scan"
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", mesh_of("tpu"))
    with jax.default_device(cpu):
        assert chosen() == "tpu"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_wkv4_of_one_token_takes_the_scan_form(chosen, machine, platform):
    machine(platform, "9.0" if platform == "gpu" else None)
    assert chosen(1) == "scan" and chosen(2) != "associative"


@pytest.mark.parametrize(
    ("capability", "form"), [("9.0", "gpu"), ("12.0", "gpu"), ("8.0", "associative"), ("gfx942", "associative")]
)
def test_wkv4_takes_the_gpu_kernel_from_hopper_on_and_never_for_float64(chosen, machine, x64, capability, form):
    machine("gpu", capability)
    assert hopper_at_hand() == (form == "gpu")
    assert chosen() == form and chosen(dtype=np.float64) == "associative"


def test_wkv4_takes_associative_on_a_platform_without_a_kernel(chosen, machine):
    machine("metal")
    assert chosen() == "associative"


@pytest.mark.parametrize("form", FORMS)
def test_wkv4_never_replaces_a_named_form(chosen, machine, form):
    machine("gpu", "9.0")
    for T in (1, 20):
        assert wkv4(*arguments(T), impl=form) == form


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_wkv4_computes_on_the_cpu_of_a_machine_with_an_accelerator(machine, platform):
    on_the_cpu = jax.device_put(arguments(18), jax.devices("cpu")[0])
    machine(platform, "9.0" if platform == "gpu" else None)
    found, wanted = wkv4(*on_the_cpu), wkv4(*on_the_cpu, impl="scan")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("platform", "forms"), [("cpu", {"scan"}), ("tpu", {"tpu", "scan"}), ("gpu", {"associative"})]
)
def test_wkv4_without_a_named_form_traces_that_of_the_platform_only(machine, monkeypatch, platform, forms):
    """And beside a kernel the form for arrays that are committed to the CPU of its machine."""
    passes, traced = OPERATOR._passes, []

    def record(form):
        forward, backward = passes(form)
        note = lambda direction: traced.append((form, direction))
        return (
            lambda *args: note("forward") or forward(*args),
            lambda *args: note("backward") or backward(*args),
        )

    monkeypatch.setattr(OPERATOR, "_passes", record)
    machine(platform, "8.0" if platform == "gpu" else None)
    w, u, k, v, state = arguments(19)  # a shape of this test's own, which no other has traced
    jax.make_jaxpr(jax.grad(lambda v: wkv4(w, u, k, v, state)[0].sum()))(v)
    assert set(traced) == {(form, direction) for form in forms for direction in ("forward", "backward")}


def test_wkv4_without_a_named_form_is_the_program_of_the_form_itself():
    trace = lambda impl: str(jax.make_jaxpr(functools.partial(wkv4, impl=impl))(*arguments(20)))
    assert trace(None) == trace("scan") != trace("associative")


def test_wkv4_without_a_named_form_is_lowered_to_the_kernel_on_a_tpu(machine):
    machine("tpu")
    text = jax.jit(lambda *args: wkv4(*args)).trace(*arguments(20)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @tpu_custom_call") == 1 and "stablehlo.while" not in text


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wkv4_kernel_by_name_is_left_to_the_lowering(monkeypatch, x64, dtype):
    """Whatever this machine is: each platform gets its own kernel, a CPU the interpreter."""
    asked = {}
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, **kernels: asked.update(kernels))
    OPERATOR._applied.__wrapped__("pallas", *arguments(20, dtype), None, None)
    kernels = {"cpu": "interpreted", "tpu": "tpu", "cuda": "gpu"}
    assert all(kernel.func is OPERATOR._wkv4 for kernel in asked.values())
    if dtype == "float64":
        del kernels["cuda"]
    assert {platform: kernel.args[0] for platform, kernel in asked.items()} == kernels


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
        ({"u_D": np.zeros((1, 6))}, r"u is \(1, 6\), expected \(6,\)"),
        ({"v_BTD": np.zeros((4, 15, 6))}, r"k and v are \(4, 16, 6\) and \(4, 15, 6\), expected one shape"),
        ({"state": WKV4State(*np.zeros((3, 1, 6)))}, r"state.num is \(1, 6\), expected \(4, 6\)"),
        ({"reset_BT": np.zeros((4, 1), bool)}, r"reset_BT is \(4, 1\), expected \(4, 16\)"),
        ({"valid_BT": np.zeros((16, 4), bool)}, r"valid_BT is \(16, 4\), expected \(4, 16\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wkv4_names_an_argument_that_does_not_fit(change, line):
    w, u, k, v, state = arguments(16)
    with pytest.raises(ValueError, match=f"^{line}"):
        wkv4(**({"w_D": w, "u_D": u, "k_BTD": k, "v_BTD": v, "state": state} | change))
