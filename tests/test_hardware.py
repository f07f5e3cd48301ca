"""FLOP counts against XLA's own counts for a small model, and the table of data sheets."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rwkv_jax import hardware, models

T, L = 16, 2  # one chunk of the later versions' operators: XLA counts the body of a loop once for any number of trips
SLOWLY = lambda *names: [pytest.param(name, marks=pytest.mark.slow) for name in names]
WKV = {"rwkv5": 4 * 64 + 3 * T, "rwkv6": 4 * 64 + 3 * T, "rwkv7": 8 * 64 + 12 * T}  # forward, times D a layer
ELEMENTWISE = {
    "rwkv4": 120,
    "transformer": 229,
    "rwkv5": 301,
    "rwkv6": 350,
    "rwkv7": 416,
}  # both passes, times D a layer
TWICE = lambda f, D: f(2 * D) - 2 * f(D)  # cancels terms that are linear in D
EXPONENTS = dict.fromkeys(WKV, 2 * 5 * T)  # the products that sum log decays, forward, times D a layer
LOW_RANKS = {"rwkv6": 5 * 32 + 64, "rwkv7": 3 * 32 + 64}


def _model(name, D, remat="none", **variant):
    low_ranks = (32, 32, 32, 64) if name == "rwkv7" else None  # the same at every D
    sizes = {"vocab_size": 512, "num_layers": L, "dim": D, "head_size": 64, "low_ranks": low_ranks}
    return models.build(name, **sizes, scan=False, remat=remat, variant=variant)


@functools.cache
def _counted(name, D, remat="none", **variant):
    """FLOPs per token as XLA counts them, forward and backward; for attention all pairs, while `hardware` counts
    half."""
    model, tokens_BT = _model(name, D, remat, **variant), np.zeros((2, T), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)

    def loss(params):
        logits_BTV, _ = model.apply(params, tokens_BT)
        return (logits_BTV**2).mean()

    flops = jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"] / tokens_BT.size
    return flops - (6 * D * T * L if name == "transformer" else 0)


def _formula(name, D):
    """`flops_per_token` with the sums of log decays; for RWKV-7 without v1 and v2 of the first layer."""
    more = 3 * L * EXPONENTS.get(name, 0) - (6 * 2 * 32 if name == "rwkv7" else 0)
    return hardware.flops_per_token(_model(name, D), T) + more * D


@pytest.mark.parametrize("name", ["rwkv4", "transformer", "rwkv7", *SLOWLY("rwkv5", "rwkv6")])
def test_flops_per_token_agree_with_xla_on_an_unrolled_model(name):
    """Matrix products agree to one in a thousand. All FLOPs agree up to elementwise operations, norms, lerps, gates
    and the loops of WKV."""
    D = 128
    formula, counted = functools.partial(_formula, name), functools.partial(_counted, name)
    assert TWICE(formula, D) == pytest.approx(TWICE(counted, D), rel=1e-3)
    assert counted(2 * D) - formula(2 * D) == pytest.approx(ELEMENTWISE[name] * L * 2 * D, rel=0.05)


@pytest.mark.slow
def test_flops_per_token_of_an_rwkv7_variant_leave_out_removed_matrices():
    """The elementwise operations on their products are excepted; the first layer never has v1 and v2."""
    D, without = 128, {"in_context_rate": False, "value_residual": False}
    formula = lambda **variant: hardware.flops_per_token(_model("rwkv7", D, **variant), T)
    less = formula() - formula(**without) - 6 * 2 * 32 * D
    assert 0 < _counted("rwkv7", D) - _counted("rwkv7", D, **without) - less < 60 * L * D


@pytest.mark.parametrize("name", ["rwkv4", "transformer", *SLOWLY("rwkv5", "rwkv6", "rwkv7")])
@pytest.mark.parametrize("remat", ["outputs", *SLOWLY("matmuls", "block")])
def test_recomputed_flops_per_token_agree_with_xla(name, remat):
    """All that the formula leaves out is linear in D: elementwise operations, WKV, attention's own products and those
    with low-rank maps."""
    more = lambda D: _counted(name, D, remat) - _counted(name, D)
    formula = lambda D: hardware.recomputed_flops_per_token(_model(name, D, remat))
    assert TWICE(formula, 128) == pytest.approx(TWICE(more, 128), rel=1e-3, abs=1e3)
    assert formula(128) < more(128)


def test_flops_per_token_equal_table_2_of_the_paper():
    model = models.build("rwkv4", vocab_size=50277, num_layers=12, dim=768)
    assert hardware.flops_per_token(model, 1024) == pytest.approx(3 * 2.613e8, rel=0.005)  # Table 2: forward


def test_bandwidths_and_peak_count_every_byte_and_operation(monkeypatch):
    """With 2 seconds a pass over 400 bytes, or a product of 8 x 8 matrices."""
    monkeypatch.setattr(hardware, "_best_seconds", lambda f: f() is not None and 2.0)
    monkeypatch.setattr(hardware, "_large_array", lambda: jax.numpy.ones(100, np.float32))
    assert (hardware.copy_bandwidth(), hardware.read_bandwidth()) == (400, 200)
    assert hardware.matmul_peak(size=8) == 8**3


def test_peak_flops_take_the_longest_matching_name_of_a_chip():
    peak = lambda kind: hardware.peak_flops(SimpleNamespace(device_kind=kind))
    assert [peak(kind) for kind in ("TPU v5 lite", "TPU v5p", "cpu")] == [197e12, 459e12, None]
