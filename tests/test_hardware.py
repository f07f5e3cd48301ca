"""FLOP counts against XLA's own of a small model, and the table of data sheets."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rwkv_jax import hardware, models

T, L = 16, 2  # one chunk of the later versions' operators: XLA counts the body of a loop once, whatever its trips
SLOWLY = lambda *names: [pytest.param(name, marks=pytest.mark.slow) for name in names]
WKV = {"rwkv5": 4 * 64 + 3 * T, "rwkv6": 4 * 64 + 3 * T, "rwkv7": 8 * 64 + 12 * T}  # forward, times D a layer
EXPONENTS = dict.fromkeys(WKV, 2 * 5 * T)  # of the products that sum log decays, forward, times D a layer
LOW_RANKS = {"rwkv6": 5 * 32 + 64, "rwkv7": 3 * 32 + 64}


def _model(name, D, remat="none", **variant):
    low_ranks = (32, 32, 32, 64) if name == "rwkv7" else None  # the same at every D
    sizes = {"vocab_size": 512, "num_layers": L, "dim": D, "head_size": 64, "low_ranks": low_ranks}
    return models.build(name, **sizes, scan=False, remat=remat, variant=variant)


@functools.cache
def _counted(name, D, remat="none", **variant):
    """FLOPs a token that XLA counts, forward and backward; of attention all pairs, where `hardware` counts half."""
    model, tokens_BT = _model(name, D, remat, **variant), np.zeros((2, T), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)

    def loss(params):
        logits_BTV, _ = model.apply(params, tokens_BT)
        return (logits_BTV**2).mean()

    flops = jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"] / tokens_BT.size
    return flops - (6 * D * T * L if name == "transformer" else 0)


def _formula(name, D):
    """`flops_per_token` with the sums of log decays; of RWKV-7 without the first layer's v1 and v2."""
    more = 3 * L * EXPONENTS.get(name, 0) - (6 * 2 * 32 if name == "rwkv7" else 0)
    return hardware.flops_per_token(_model(name, D), T) + more * D


@pytest.mark.parametrize("name", ["rwkv4", "transformer", "rwkv7", *SLOWLY("rwkv5", "rwkv6")])
def test_flops_per_token_are_those_that_xla_counts_in_an_unrolled_model(name):
    """Products of matrices to one in a thousand; everything, but for what is done by element, norms, lerps, gates and
    the loops of WKV: of both passes 120 operations a channel and layer in RWKV-4, 420 in RWKV-7."""
    D = 128
    twice = lambda f: f(2 * D) - 2 * f(D)  # where what is proportional to D drops out
    formula, counted = functools.partial(_formula, name), functools.partial(_counted, name)
    assert twice(formula) == pytest.approx(twice(counted), rel=1e-3)
    assert 0 < counted(2 * D) - formula(2 * D) < 450 * L * 2 * D


@pytest.mark.slow
def test_flops_per_token_of_rwkv7_lack_those_of_the_matrices_that_a_variant_lacks():
    """But for what is done by element with their products, and v1 and v2, which the first layer never has."""
    D, without = 128, {"in_context_rate": False, "value_residual": False}
    formula = lambda **variant: hardware.flops_per_token(_model("rwkv7", D, **variant), T)
    less = formula() - formula(**without) - 6 * 2 * 32 * D
    assert 0 < _counted("rwkv7", D) - _counted("rwkv7", D, **without) - less < 60 * L * D


@pytest.mark.parametrize("name", ["rwkv4", "transformer", *SLOWLY("rwkv5", "rwkv6", "rwkv7")])
@pytest.mark.parametrize("remat", ["outputs", *SLOWLY("matmuls", "block")])
def test_recomputed_flops_per_token_are_those_that_xla_counts(name, remat):
    """But for the forward pass by element, 100 D a layer, attention's own products, 4 D T, those of WKV and those with
    low-rank maps, 2 D for each of their two sides."""
    D = 128
    more = _counted(name, D, remat) - _counted(name, D)
    rest = more - hardware.recomputed_flops_per_token(_model(name, D, remat))
    own = {kind: WKV[kind] + EXPONENTS[kind] + 4 * LOW_RANKS.get(kind, 0) for kind in WKV} | {"transformer": 4 * T}
    assert 0 < rest < L * D * (100 + own.get(name, 0))


def test_flops_per_token_equal_those_of_table_2_in_the_paper():
    model = models.build("rwkv4", vocab_size=50277, num_layers=12, dim=768)
    products = 2 * (50277 * 768 + 13 * 768**2 * 12)  # forward
    assert hardware.flops_per_token(model, 1024) == pytest.approx(3 * products, rel=0.005)


def test_peak_flops_are_those_of_the_longest_kind_that_fits():
    peak = lambda kind: hardware.peak_flops(SimpleNamespace(device_kind=kind))
    assert [peak(kind) for kind in ("TPU v5 lite", "TPU v5p", "cpu")] == [197e12, 459e12, None]
