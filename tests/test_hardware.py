"""FLOP counts against XLA's own of a small model, and the table of data sheets."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax import hardware, models


@pytest.mark.parametrize("name, kind", [("rwkv4", "rwkv4"), ("transformer", "attention")])
def test_flops_of_a_token_are_those_that_xla_counts_in_an_unrolled_model(name, kind):
    L, T, D = 3, 32, 256
    # one group of three layers: XLA counts the body of a loop once, whatever its trips
    model = models.build(name, vocab_size=512, num_layers=L, dim=D, layers=(kind,) * L)
    tokens_BT = jnp.zeros((2, T), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)

    def loss(params):
        logits_BTV, _ = model.apply(params, tokens_BT)
        return jnp.mean(logits_BTV**2)

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"] / tokens_BT.size
    # beside the products: element-wise work (about 1 % at this width), and attention of all pairs, not the causal half
    assert hardware.flops_per_token(model, T) == pytest.approx(counted, rel=0.03)


def test_flops_agree_with_the_table_of_the_paper():
    model = models.build("rwkv4", vocab_size=50277, num_layers=12, dim=768)
    products = 2 * (50277 * 768 + 13 * 768**2 * 12)  # Table 2, forward
    assert hardware.flops_per_token(model, 1024) == pytest.approx(3 * products, rel=0.005)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks_by_the_longest_kind_that_fits(kind, peak):
    assert hardware.peak_flops(SimpleNamespace(device_kind=kind)) == peak
