"""The rows of `docs/errata.md` that can be executed, each in about ten lines of plain arithmetic.

"The released code" is goldens/official_trajectory.npz, tensors written by `RWKV-v4neo/src/model.py` itself (V 64, L 3,
D 32), and goldens/rwkv4.npz, computed by the `rwkv` package and transformers.
"""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import special
from scipy.stats import linregress

from rwkv_jax import hardware, interop, models, ops
from rwkv_jax.data import orders
from rwkv_jax.train import optim

HERE = Path(__file__).parent
V, L, D = 64, 3, 32
RELEASED = {  # L, D, and what Table 2 prints: parameters, forward FLOPs of a token
    "169M": (12, 768, 1.693e8, 2.613e8),
    "430M": (24, 1024, 4.304e8, 7.573e8),
    "1.5B": (24, 2048, 1.515e9, 2.823e9),
    "3B": (32, 2560, 2.985e9, 5.710e9),
    "7B": (32, 4096, 7.393e9, 1.437e10),
    "14B": (40, 5120, 1.415e10, 2.778e10),
}
PILE_TOKENS, PILE_PRIME = 332_115_325_534, 324_331_313  # RWKV-v4neo, of windows of 1,024


def released(name: str) -> np.ndarray:
    """A tensor as the released code initialises it, "1.att.key.weight" for layer 1."""
    golden = np.load(HERE / "goldens" / "official_trajectory.npz")
    return np.float64(golden[f"init/blocks.{name}" if name[0].isdigit() else f"init/{name}"])


def depth(layer: int) -> tuple[float, float]:
    return layer / (L - 1), 1 - layer / L


def norm(x, eps=1e-5):
    """LayerNorm without its weight and bias."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def num_parameters(vocab_size, layers, dim):
    return 2 * vocab_size * dim + 13 * dim**2 * layers + dim * (11 * layers + 4)


def test_released_zero_matrices_are_not_those_printed():
    zero = {name for name in ("att.key", "att.receptance", "att.value", "att.output", "ffn.key", "ffn.receptance",
                              "ffn.value") if not released(f"1.{name}.weight").any()}  # fmt: skip
    assert zero == {"att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value"}
    # as printed: W_v of channel mixing is drawn, W_k and W_r are zero
    x_D, W_v = np.linspace(-1, 1, D), 2 * np.random.default_rng(0).standard_normal((4 * D, D))

    def loss(W_k, W_r, W_v):
        return jnp.sum(jax.nn.sigmoid(x_D @ W_r) * (jax.nn.relu(x_D @ W_k) ** 2 @ W_v) * x_D)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(np.zeros((D, 4 * D)), np.zeros((D, D)), W_v)
    assert not any(np.asarray(gradient).any() for gradient in gradients)  # and stays zero after any step


def test_receptance_mix_has_its_half_in_the_exponent():
    for layer in range(L):
        power = depth(layer)[1]
        mix_D = released(f"{layer}.att.time_mix_r").ravel()
        np.testing.assert_allclose(mix_D, (np.arange(D) / D) ** (0.5 * power), atol=1e-6)
        assert np.abs(mix_D - 0.5 * (np.arange(D) / D) ** power).max() > 0.4  # as printed


def test_time_decay_formula_is_of_the_log_decay_over_the_width():
    for layer in range(L):
        x_D = released(f"{layer}.att.time_decay")
        np.testing.assert_allclose(x_D, -5 + 8 * (np.arange(D) / (D - 1)) ** (0.7 + 1.3 * depth(layer)[0]), atol=1e-6)
        assert x_D.shape == (D,) and x_D[0] == -5 and x_D[-1] == 3  # not 4 D channels
    # w itself must not be negative: a w of -5 would multiply the past by 148 with every token
    assert x_D.min() < 0 and np.exp(5) > 148 and (np.exp(-np.exp(x_D)) < 1).all()


def test_token_shift_takes_the_normalised_input():
    golden = np.load(HERE / "goldens" / "rwkv4.npz")
    weights = {name[8:]: np.float32(golden[name]) for name in golden if name.startswith("weights/")}
    first = {name: x for name, x in weights.items() if not name.startswith(("blocks.1.", "blocks.2."))}
    model, params = interop.from_official(first, scan=False)
    token = int(golden["tokens_BT"][0, 0])
    _, state = jax.jit(model.apply)({"params": params}, np.full((1, 1), token))
    x_D = weights["emb.weight"][token]
    for name in ("blocks.0.ln0", "blocks.0.ln1"):
        x_D = norm(x_D) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    np.testing.assert_allclose(state[0].att_last[0], x_D, rtol=1e-4, atol=1e-5)  # test_goldens.py compares the logits


def test_layer_norm_leaves_tiny_embeddings_below_unit_scale():
    rng, size = np.random.default_rng(0), (1000, 768)
    tables = {
        "v4": rng.normal(0, 1e-4, size),
        "v5": rng.uniform(-1e-4, 1e-4, size),
        "v4neo": rng.uniform(-6e-4, 6e-4, size),
    }
    after = {name: norm(table).std() for name, table in tables.items()}
    assert after == pytest.approx({"v4": 0.0316, "v5": 0.0183, "v4neo": 0.109}, rel=0.01)
    assert norm(tables["v4"], eps=1e-6).std() == pytest.approx(0.0995, rel=0.01)
    assert norm(tables["v4"] * 100).std() > 0.95  # the purpose of a norm
    assert 5.9e-4 < np.abs(released("emb.weight")).max() <= 6e-4  # the released trainer's: its learning rate


def test_head_gain_grows_for_large_vocabularies_only():
    head_VD = released("head.weight")
    np.testing.assert_allclose(head_VD.T @ head_VD, 0.25 * V / D * np.eye(D), atol=1e-6)
    small_DV = np.asarray(models.layers.orthogonal(0.5)(jax.random.key(0), (64, 32)))
    np.testing.assert_allclose(small_DV.T @ small_DV, 0.25 * np.eye(32), atol=1e-5)  # and not 0.25 * 32 / 64


def test_depth_ratio_of_one_layer_divides_by_zero():
    with pytest.raises(ZeroDivisionError):
        _ = 0 / (1 - 1)  # ratio_0_to_1 of the released code, layer 0 of 1
    assert models.layers.depth_ratios(0, 1) == (0, 1)


def test_table_2_flops_count_vd_once():
    for layers, dim, parameters, flops in RELEASED.values():
        assert num_parameters(50277, layers, dim) == pytest.approx(parameters, rel=5e-4)
        VD, blocks = 50277 * dim, 13 * dim**2 * layers
        assert 2 * (VD + blocks) == pytest.approx(flops, rel=5e-4)
        assert abs(6 * (VD + blocks) / flops - 1) > 1.9 and 2 * (2 * VD + blocks) / flops - 1 > 0.018  # as printed


def test_doubled_parameter_count_is_not_what_version_1_says():
    def excess(size, counted):
        layers, dim, _, _ = RELEASED[size]
        without = (2 - counted) * 50277 * dim
        return 100 * ((num_parameters(50277, layers, dim) - without) / (50277 * dim + 13 * dim**2 * layers) - 1)

    assert [round(excess(size, 2), 1) for size in ("14B", "169M")] == [1.9, 29.6]
    assert [round(excess(size, 1), 2) for size in ("14B", "169M")] == [0.02, 0.08]  # without the embedding
    assert excess("14B", 0) < 0 and excess("169M", 0) < -29  # without the head, too


def test_flops_depend_on_the_length_for_attention_alone():
    flops = lambda name, dim, T: hardware.flops_per_token(
        models.build(name, vocab_size=256, num_layers=12, dim=dim), T
    )
    assert flops("rwkv4", 512, 1024) == flops("rwkv4", 512, 65536)
    assert flops("transformer", 512, 65536) > 8 * flops("transformer", 512, 1024)
    share = lambda dim: 60 * 12 * dim / flops("rwkv4", dim, 1024)  # WKV itself, which the formula leaves out
    assert 0.008 < share(64) < 0.02 and 0.001 < share(512) < 0.002


def test_auxiliary_loss_has_a_gradient_at_the_largest_logit_only():
    logits_BTV = np.random.default_rng(0).standard_normal((2, 3, 11), np.float32)
    ours = np.asarray(jax.jit(jax.grad(lambda x: optim.l2wrap(x).mean()))(logits_BTV))
    largest = logits_BTV.max(-1, keepdims=True)
    np.testing.assert_allclose(ours, np.where(logits_BTV == largest, 1e-4 / 6 * largest, 0), rtol=1e-5)
    palm = 1e-4 / 6 * 2 * special.logsumexp(logits_BTV, -1, keepdims=True) * special.softmax(logits_BTV, -1)
    assert (ours != 0).sum() == 6 and (palm != 0).all()  # palm: the gradient of 1e-4 mean(log² Z)


def test_epoch_is_332_billion_tokens():
    assert 8043 * 40320 * 1024 == 332_076_810_240
    is_prime = lambda n: all(n % d for d in range(2, math.isqrt(n) + 1))
    assert next(n for n in range(PILE_TOKENS // 1024, 1, -1) if n % 3 == 2 and is_prime(n)) == PILE_PRIME
    assert PILE_PRIME // 40320 == 8043  # mini-epochs of 40,320 windows


def test_released_order_needs_more_than_64_bits():
    factor, last = int(PILE_PRIME * (math.sqrt(5) - 1) / 2), 8043 * 40320
    assert factor * last**3 > 5e33 > 2**64
    with np.errstate(over="ignore"):
        wrapped = (np.int64(factor) * np.int64(last) ** 3) % PILE_PRIME
    assert wrapped != factor * last**3 % PILE_PRIME
    text = orders.Text(np.zeros(5 * 7 + 1, np.uint8), None, None)  # five windows of 7: prime 5, factor 3, ii from 1
    rows = orders.ORDERS["released"](text, 7, 1, 0)(np.arange(4))
    assert (rows.at[:, 0] // 7).tolist() == [3 * ii**3 % 5 for ii in (1, 2, 3, 4)]


def test_bfloat16_row_gradients_lose_sums_that_nearly_cancel():
    rows_B = np.array([1.001, -1.0])  # the decay gradient of one channel, for two rows of a batch
    by_row = rows_B.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert rows_B.sum() == pytest.approx(1e-3) and by_row.sum() == 0


def test_halved_residual_stream_leaves_the_logits_unchanged():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(12, 64, 64)) / 8

    def logits(rescale):
        x_D = rng_x.copy()
        for i, W in enumerate(weights):
            x_D = x_D + np.tanh(norm(x_D)) @ W / (2 ** (i // 6) if rescale else 1)
            x_D = x_D / 2 if rescale and (i + 1) % 6 == 0 else x_D
        return norm(x_D), np.abs(x_D).max()

    rng_x = rng.normal(size=64)
    (plain, largest), (rescaled, smaller) = logits(False), logits(True)
    np.testing.assert_allclose(rescaled, plain, atol=1e-4)  # up to the norm's epsilon
    assert smaller == pytest.approx(largest / 4, rel=1e-4)


def test_state_of_zeros_is_not_the_empty_state():
    def released_kernel(k, u, v, num, den, p):  # Eqs. 23-28 in float32
        q = np.maximum(p, u + k)
        return (np.exp(p - q) * num + np.exp(u + k - q) * v) / (np.exp(p - q) * den + np.exp(u + k - q))

    k, u, v, zero = (np.float32(x) for x in (-110, 0, 3, 0))
    assert released_kernel(k, u, v, zero, zero, np.float32(-1e38)) == 3  # the first token sees itself
    with np.errstate(invalid="ignore"):
        assert np.isnan(released_kernel(k, u, v, zero, zero, zero))  # zeros_like(state)
    empty = ops.WKV4State.empty(1, 1)
    w_D, u_D = np.float32([-1]), np.float32([0])
    y_BTD, _ = ops.wkv4(w_D, u_D, np.full((1, 1, 1), k), np.full((1, 1, 1), v), empty)
    assert y_BTD.item() == 3


def test_long_range_arena_average_is_not_the_printed_one():
    tasks = [55.88, 86.04, 88.34, 70.53, 58.42]  # ListOps, Text, Retrieval, Image, Pathfinder; Path-X failed
    assert np.mean(tasks) == pytest.approx(71.84, abs=0.005)  # 72.07 is printed
    assert np.mean([*tasks, 50]) == pytest.approx(68.20, abs=0.005)  # a failure as chance, as in most rows
    assert np.mean([36.37, 64.27, 57.46, 42.44, 71.40, 50]) == pytest.approx(53.66, abs=0.005)  # the Transformer's
    assert np.mean([39.98, 65.38, 76.15, 50.45, 72.17]) == pytest.approx(60.83, abs=0.005)  # Hrrformer's: of five
    assert tasks[-1] < min(71.40, 68.50, 74.87, 75.30, 77.05, 77.80, 70.94, 77.72, 72.17, 94.20)


def test_enwik8_bits_are_of_a_vocabulary_of_characters():
    assert round(num_parameters(6064, 6, 512) / 1e6) == 27  # the 27M of the RWKV-2 release with this number
    assert round(num_parameters(256, 6, 512) / 1e6) == 21  # with a vocabulary of bytes, also 6 x 512
    text = "é" * 4 + "a" * 992
    assert len(text.encode()) / len(text) == pytest.approx(1.004, abs=1e-4)  # about enwik8's bytes for a character


def test_straight_line_fits_a_law_that_bends():
    compute = np.logspace(18, 20, 40)
    law = lambda C: np.log10(1.69 + 1070 * C**-0.155)  # the limit is 1.69 nats
    line = linregress(np.log10(compute), law(compute))
    assert line.rvalue**2 > 0.994  # the paper's r^2, of a law that bends
    held_out = np.logspace(20, 23, 30)
    predicted = line.intercept + line.slope * np.log10(held_out)
    assert np.abs(10 ** (predicted - law(held_out)) - 1).max() > 0.05


def test_errata_page_and_proofs_match_one_to_one():
    page = (HERE.parent / "docs" / "errata.md").read_text()
    named = re.findall(r"`(test_\w+)`", page)
    proofs = [
        name
        for name in globals()
        if name.startswith("test_") and name != "test_errata_page_and_proofs_match_one_to_one"
    ]
    assert named == proofs  # in the page's order, each once
