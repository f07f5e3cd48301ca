"""The speed benchmark: one small run of the whole command, its parts, and its GPU peers judged on a CPU."""

import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import drawn

from experiments.speed import decode, gpu_peers, ops, plot, rwkv7, startup, train
from rwkv_jax.ops import wkv4, wkv6, wkv7

ROOT = Path(__file__).parents[2]
SHAPE = (2, 24, 64, "bfloat16")


@pytest.mark.slow
@pytest.mark.live
def test_speed_smoke_measures_every_suite_and_draws_its_figures(tmp_path):
    for command in (
        ["run", "--smoke", f"--out={tmp_path}"],
        ["run", "--smoke", f"--out={tmp_path}", "--suite=startup", f"--against={ROOT}"],
        ["run", "--smoke", f"--out={tmp_path}", "--suite=rwkv7"],
        ["plot", str(tmp_path / "results.json")],
    ):
        program = [sys.executable, "-m", f"experiments.speed.{command[0]}", *command[1:]]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"train", "decode", "ops", "generation", "startup", "rwkv7"}
    for row in results["train"]["models"].values():
        assert sum(row["parts"].values()) == pytest.approx(row["step_seconds"])
    assert all(row["agreed"] for row in results["generation"]["rows"])
    assert [row["agreed"] for row in results["rwkv7"]["rows"] if "agreed" in row] == [True, True]
    assert {row["state_bytes"] for row in results["generation"]["contexts"]} == {2 * 5 * 64 * 4}
    contexts = [(row["model"], row["context"]) for row in results["decode"]["sweep"]["rows"]]
    assert contexts == [(model, context) for model in ("rwkv4", "transformer") for context in (0, 64, 512)]
    assert {row["form"] for row in results["ops"]["rows"]} == {"scan", "associative", "plain scan, autodiff"}
    assert all(row["seconds"] > 0 for row in results["ops"]["rows"])
    assert all((tmp_path / f"{suite}.png").stat().st_size > 5000 for suite in plot.DRAW)


def test_speed_forms_include_the_kernel_on_platforms_that_compile_it(monkeypatch):
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert ("pallas" in ops.forms(4096)) == (platform != "cpu")


@pytest.mark.parametrize(("name", "op", "plain"), [("wkv6", wkv6, rwkv7.plain_wkv6), ("wkv7", wkv7, rwkv7.plain_wkv7)])
def test_plain_wkv6_and_plain_wkv7_agree_with_the_operators(name, op, plain):
    operands = jax.jit(lambda: rwkv7.operands(name, 0, B=2, T=8, H=2, K=4))()
    for found, want in zip(jax.jit(plain)(*operands), jax.jit(op)(*operands), strict=True):
        assert error_ratio(found, want) < 1e-6


def test_train_parts_sum_to_the_step():
    found = train.parts({"step": 10.0, "optimiser": 1.5, "operator": 2.0}, "WKV")
    assert found == {"WKV": 2.0, "optimiser": 1.5, "matmuls and the rest": 6.5}


@pytest.mark.parametrize("name", train.MODELS)
def test_train_operators_run_in_every_layer(name):
    """The result depends on the parameters of each layer, or on the input of the first."""
    f, draw = train.operators(train.build(name, train.SMOKE), train.SMOKE)
    arguments = draw(0)
    gradient = jax.grad(lambda *x: jnp.square(f(*x)).sum(), argnums=tuple(range(len(arguments))))
    for found in map(np.asarray, jax.jit(gradient)(*arguments)):
        assert all(np.abs(of_layer).max() > 0 for of_layer in (found if found.ndim == 2 else found[None]))


def test_state_bytes_counts_the_filled_slots():
    """The keys and values of all layers; for RWKV the state, independent of the context."""
    fields = {"num_layers": 3, "dim": 128, "vocab_size": 32}
    cached = decode.rwkv_jax.build("transformer", **fields).init_state(2, max_length=256)
    lengths = 3 * 2 * 2 * 4
    assert decode.state_bytes(cached, 64) == 3 * 2 * (2 * 128 * 64) * 4 + lengths
    for kind, numbers in {"rwkv4": 5 * 128, "rwkv7": (64 + 2) * 128}.items():
        assert decode.state_bytes(decode.rwkv_jax.build(kind, **fields).init_state(2), 64) == 3 * 2 * numbers * 4


def test_filled_cache_is_random_and_stays_at_its_context():
    model, params = drawn(decode.rwkv_jax.build("transformer", num_layers=1, dim=64, vocab_size=32, scan=False))
    state = decode.filled(model.init_state(1, max_length=64))
    assert np.abs(state[0].cache.k_BHSK).min() > 0
    full = decode.at_context(state, 40)
    np.testing.assert_array_equal(full[0].cache.length_B, 40)
    _, after = decode.greedy(model, params, full, np.ones((1, 1), np.int32), 3)
    np.testing.assert_array_equal(after[0].cache.length_B, 43)


def test_startup_run_compiles_once_and_takes_medians_of_both_sides(monkeypatch, tmp_path):
    taken, calls = iter(range(100)), []

    def output(root, arguments):
        calls.append((root, *arguments[1:]))
        return json.dumps({"trace": next(taken), "lower": 1} | ({"compile": 5} if "--compile" in arguments else {}))

    monkeypatch.setattr(startup, "_output", output)
    monkeypatch.setattr(startup, "commands", lambda *args: args)
    monkeypatch.setattr(startup, "SIZES", {"a": None})
    found = startup.run(against=tmp_path)
    assert found["commands"] == ({"ours": ROOT, "before": tmp_path}, False, 3)
    row = found["rows"][0]
    assert row["ours"] == {"trace": 2, "lower": 1, "compile": 5} and row["before"]["trace"] == 3
    assert len(calls) == 6 * 2 * 3 and sum("--compile" in call for call in calls) == 6 * 2
    assert calls[0] == (ROOT, "a", "stacked", "training step", "--compile") and calls[1][0] == tmp_path


def test_startup_measures_positive_seconds():
    found = startup.measured("2 x 16", "stacked", "decode step", compile=True)
    assert list(found) == ["trace", "lower", "compile"] and min(found.values()) > 0


def wkv_and_gradients(x):
    w, u, k, v, dy = x
    y, pull = jax.vjp(lambda *args: wkv4(*args)[0], w, u, k, v)
    return y, pull(dy)


def released_kernel_stand_in():
    """The interface of the CUDA kernel, implemented by our own operator."""
    import torch

    def ours(w, u, k, v, dy):
        assert w.dtype == torch.float32 and {u.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        return wkv_and_gradients([jnp.asarray(a.float().numpy()) for a in (w, u, k, v, dy)])

    def fill(out, x):
        out.copy_(torch.from_numpy(np.array(x, np.float32)).expand_as(out))

    def forward(B, T, D, w, u, k, v, y):
        assert tuple(k.shape) == (B, T, D)
        fill(y, ours(w, u, k, v, k)[0])

    def backward(B, T, D, w, u, k, v, y, dy, dw, du, dk, dv):
        gradients = ours(w, u, k, v, dy)[1]
        for out, x in zip((dw, du, dk, dv), gradients, strict=True):
            fill(out, x / B if x.ndim == 1 else x)

    return types.SimpleNamespace(forward=forward, backward=backward)


def triton_stand_in(time_decay, u, k, v, state):
    """The interface of the Triton kernel, implemented by transformers' loop, whose state is three tensors."""
    import torch
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    wide = [a.float() for a in (time_decay, u, k, v)]
    y, _ = rwkv_linear_attention_cpu(*wide, state=[s[:, 0].float() for s in state.unbind(1)])
    assert state.shape == (k.shape[0], 3, 1, k.shape[2])
    return y.to(torch.bfloat16), state


@pytest.mark.live
@pytest.mark.parametrize("peer", ["cuda", "triton"])
def test_gpu_peers_compute_wkv_on_our_inputs(peer):
    kernel = released_kernel_stand_in() if peer == "cuda" else triton_stand_in
    sides = {"cuda": gpu_peers.cuda_sides, "triton": gpu_peers.triton_sides}[peer](lambda: kernel)
    x = next(ops.inputs(*SHAPE, 1))
    want_y, (want_dw, *want) = wkv_and_gradients(x)
    numbers = lambda a: np.asarray(a.detach().float())
    assert error_ratio(numbers(sides["forward"](x)), want_y.astype(jnp.float32)) < 1e-2
    y, (dw, *rest) = sides["both"](x)
    assert error_ratio(numbers(y), want_y.astype(jnp.float32)) < 1e-2
    want_dw = want_dw * x[0] if peer == "triton" else want_dw  # by time_decay, where w = -exp(time_decay)
    for got, right in zip((dw, *rest), (want_dw, *want), strict=True):
        assert error_ratio(numbers(got), right.astype(jnp.float32)) < 2e-2


def test_attention_peer_is_causal_and_in_heads_of_64():
    x = [None, None, *np.random.default_rng(0).standard_normal((3, 2, 24, 128), np.float32)]
    sides = gpu_peers.attention_sides((2, 24, 128, "float32"), implementation="xla")
    y, _ = sides["both"](x)
    assert y.shape == (2, 24, 2, 64)
    np.testing.assert_allclose(y, sides["forward"](x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[:, 0], x[3][:, 0].reshape(2, 2, 64), rtol=1e-5)  # token 0 attends to itself only


def test_speed_ops_run_refuses_a_clone_without_the_kernel(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*wkv_op_bf16\.cpp, expected a clone of BlinkDL/RWKV-LM"):
        ops.run(True, tmp_path)


def test_first_calls_leaves_out_a_failing_peer_but_not_our_own_form():
    def fails(_):
        raise RuntimeError("no kernel image is available")

    def full(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    able, failed = ops.first_calls(
        {("scan", "both"): full, ("peer", "both"): fails, ("x", "both"): len}, iter(["abc"] * 3)
    )
    assert list(able) == [("x", "both")]
    assert failed == {("scan", "both"): "out of memory", ("peer", "both"): "no kernel image is available"}
    with pytest.raises(RuntimeError, match="no kernel image"):
        ops.first_calls({("scan", "both"): fails}, iter("a"))


def test_gpu_claims_compare_our_fastest_form_with_each_peer():
    row = lambda form, seconds, share=0.5: {
        "form": form, "shape": [8, 4096, 4096, "bfloat16"], "pass": "both", "seconds": seconds, "share_of_copy": share
    }  # fmt: skip
    rows = [row("scan", 9.0), row("associative", 2.0, 0.8), row(gpu_peers.CUDA, 4.0), row(gpu_peers.ATTENTION, None)]
    claims = ops.gpu_claims(rows)
    assert [(x, most) for _, x, most in claims] == [(1.25, 1.67), (0.5, 1.0)]
    assert all("by associative" in what for what, _, _ in claims) and gpu_peers.CUDA in claims[1][0]
