"""Every tensor at the start against the released formulas, written out in NumPy, and what follows from them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from rwkv_jax.models import build, unstack
from rwkv_jax.models.layers import LayerNorm, embedding_init

V, D, L = 80, 32, 3
ROUNDING = 8 * 4 * np.finfo(np.float32).eps  # of a vector: values up to 8, a division, a power and a sum or two
ZERO = ("att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value")


@functools.partial(jax.jit, static_argnums=0)
def init(model, key):
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def initial(name="rwkv4", seed=0, **overrides):
    """Initial tensors by official-looking name, "0.att.key" for the kernel of layer 0, whatever the layout."""
    model = build(name, **({"vocab_size": V, "dim": D, "num_layers": L} | overrides))
    params = init(model, jax.random.key(seed))
    flat = flatten_dict(unstack(params) if model.scan else params, sep=".")
    rename = lambda name: name.removeprefix("blocks_").removesuffix(".kernel").removesuffix(".embedding")
    return {rename(name): np.asarray(x) for name, x in flat.items()}


def vectors(layer, layers):
    """The vectors of one layer as RWKV-LM (RWKV-v4neo) sets them."""
    i = np.arange(D)
    ratio01 = layer / (layers - 1) if layers > 1 else 0.0
    ratio10 = 1 - layer / layers
    return {
        "ln1.scale": np.ones(D),
        "ln1.bias": np.zeros(D),
        "ln2.scale": np.ones(D),
        "ln2.bias": np.zeros(D),
        "att.time_decay": np.array([-5 + 8 * (h / (D - 1)) ** (0.7 + 1.3 * ratio01) for h in range(D)]),
        "att.time_first": np.array([math.log(0.3) + 0.5 * ((h + 1) % 3 - 1) for h in range(D)]),
        "att.time_mix_k": (i / D) ** ratio10,
        "att.time_mix_v": (i / D) ** ratio10 + 0.3 * ratio01,
        "att.time_mix_r": (i / D) ** (0.5 * ratio10),
        "ffn.time_mix_k": (i / D) ** ratio10,
        "ffn.time_mix_r": (i / D) ** ratio10,
    }


def is_orthogonal(kernel, gain):
    """K K^T = gain^2 I, or K^T K where that is the smaller of the two."""
    smaller = kernel @ kernel.T if kernel.shape[0] <= kernel.shape[1] else kernel.T @ kernel
    np.testing.assert_allclose(smaller, gain**2 * np.eye(len(smaller)), atol=1e-5 * gain**2)


@pytest.mark.parametrize(("layers", "scan"), [(L, True), (L, False), (1, True), (1, False)])
def test_every_tensor_follows_its_formula(layers, scan):
    tensors = dict(initial(num_layers=layers, scan=scan))
    for layer in range(layers):
        for name, want in vectors(layer, layers).items():
            np.testing.assert_allclose(tensors.pop(f"{layer}.{name}"), want, rtol=0, atol=ROUNDING, err_msg=name)
        for name in ZERO:
            assert not tensors.pop(f"{layer}.{name}").any(), name
        is_orthogonal(tensors.pop(f"{layer}.att.value"), 1.0)
        is_orthogonal(tensors.pop(f"{layer}.ffn.key"), 2.0)  # sqrt(4D / D)
    is_orthogonal(tensors.pop("head"), 0.5 * math.sqrt(V / D))
    for name in ("ln0", "ln_out"):
        np.testing.assert_array_equal(tensors.pop(f"{name}.scale"), np.ones(D))
        np.testing.assert_array_equal(tensors.pop(f"{name}.bias"), np.zeros(D))
    assert tensors.keys() == {"emb"}


def test_the_head_of_a_small_vocabulary_keeps_gain_one_half():
    is_orthogonal(initial(vocab_size=16, embedding_scale=2e-3)["head"], 0.5)


@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_and_every_seed_draws_its_own(scan):
    drawn = [
        initial(scan=scan, seed=seed)[f"{layer}.{name}"]
        for seed in (0, 1)
        for layer in range(L)
        for name in ("att.value", "ffn.key")
    ]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert a.shape != b.shape or np.abs(a - b).max() > 0.1


@pytest.mark.parametrize(
    ("scheme", "deviation", "after_ln0"),
    [("v4", 1e-4, 0.032), ("v4neo", 6e-4 / math.sqrt(3), 0.109), ("v5", 1e-4 / math.sqrt(3), 0.018)],
)
def test_the_three_embeddings(scheme, deviation, after_ln0):
    """They differ by what LN0 makes of them: its epsilon, 1e-5, is larger than their variance."""
    table = np.asarray(embedding_init(scheme, None)(jax.random.key(0), (400, 128)))
    np.testing.assert_allclose(table.std(), deviation, rtol=0.02)
    np.testing.assert_allclose(table.mean(), 0, atol=0.02 * deviation)
    if scheme == "v4":
        is_orthogonal(table, 1e-4 * math.sqrt(400))
    else:
        bound = deviation * math.sqrt(3)
        assert 0.99 * bound < np.abs(table).max() <= bound
    norm = LayerNorm()
    out = norm.apply(norm.init(jax.random.key(0), table), table)
    np.testing.assert_allclose(np.asarray(out).std(), after_ln0, rtol=0.03)


def test_the_embedding_is_a_field():
    largest = lambda **fields: np.abs(initial(**fields)["emb"]).max()
    assert 5.5e-4 < largest() <= 6e-4
    assert 1.8e-3 < largest(vocab_size=16, embedding_scale=2e-3) <= 2e-3
    np.testing.assert_allclose(
        initial(param_dtype="bfloat16", embedding_init="v4")["emb"].astype(np.float32).std(), 1e-4, rtol=0.03
    )


def test_the_norm_is_torch_s():
    """Epsilon 1e-5 and the variance in two passes: x - mean first."""
    x = 1000 + 1e-2 * np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    norm = LayerNorm()
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    exact = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, exact, atol=0.01)
    assert isinstance(norm, nn.LayerNorm)


def test_decays_stay_float32_beside_bfloat16_parameters():
    tensors = initial(param_dtype="bfloat16", embedding_init="v4")
    wide = {name.split(".", 1)[1] for name, x in tensors.items() if x.dtype == np.float32}
    assert wide == {"att.time_decay", "att.time_first"}
    np.testing.assert_array_equal(tensors["1.att.time_decay"], initial()["1.att.time_decay"])


def test_the_baseline_starts_alike():
    """Orthogonal inputs, zero outputs, and RWKV's own mixes in the token shift."""
    tensors = initial("transformer", token_shift=True)
    for layer in range(L):
        like = vectors(layer, L)
        for letter, name in zip("qkv", ("query", "key", "value"), strict=True):
            is_orthogonal(tensors[f"{layer}.att.{name}"], 1.0)
            mix = like["att.time_mix_r" if letter == "q" else f"att.time_mix_{letter}"]
            np.testing.assert_allclose(tensors[f"{layer}.att.time_mix_{letter}"], mix, rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(tensors[f"{layer}.ffn.time_mix_k"], like["ffn.time_mix_k"], rtol=0, atol=ROUNDING)
        is_orthogonal(tensors[f"{layer}.ffn.key"], math.sqrt(4.5))
        assert not tensors[f"{layer}.att.output"].any() and not tensors[f"{layer}.ffn.value"].any()
    is_orthogonal(tensors["head"], 0.5 * math.sqrt(V / D))


@pytest.mark.parametrize("scan", [True, False])
def test_a_hybrid_s_layers_know_their_depth(scan):
    tensors = initial(layers=("rwkv4", "attention"), num_layers=4, scan=scan)
    for layer in (0, 2):
        np.testing.assert_allclose(
            tensors[f"{layer}.att.time_decay"], vectors(layer, 4)["att.time_decay"], rtol=0, atol=ROUNDING
        )
        assert f"{layer + 1}.att.query" in tensors
    tensors = initial(layers=("attention", "rwkv4"), num_layers=4, scan=scan)
    for layer in (1, 3):
        np.testing.assert_allclose(
            tensors[f"{layer}.att.time_mix_v"], vectors(layer, 4)["att.time_mix_v"], rtol=0, atol=ROUNDING
        )


# ------------------------------------------------------------------------------------------- first steps


def problem(layers):
    """(initial parameters, jitted gradient of the mean next-token loss), one set of parameters a layer."""
    model = build("rwkv4", vocab_size=V, dim=D, num_layers=layers, scan=False)
    tokens_BT = np.random.default_rng(0).integers(0, V, (4, 12))
    params = init(model, jax.random.key(0))

    def loss(params):
        logits_BTV, _ = model.apply({"params": params}, tokens_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).mean()

    return params, jax.jit(jax.grad(loss))


def with_gradient(gradients):
    return {name for name, x in flatten_dict(gradients, sep=".").items() if np.any(x)}


def adam_step(params, gradients):
    return jax.tree.map(lambda p, g: p - 1e-2 * np.sign(g), params, gradients)  # what Adam's first step does


@pytest.mark.parametrize("layers", [1, L])
def test_which_tensors_have_a_gradient_at_the_start(layers):
    params, gradient = problem(layers)
    outside = {"emb.embedding", "head.kernel", *(f"{n}.{x}" for n in ("ln0", "ln_out") for x in ("scale", "bias"))}
    inside = {f"blocks_{i}.{name}.kernel" for i in range(layers) for name in ("att.output", "ffn.value")}
    gradients = gradient(params)
    assert with_gradient(gradients) == outside | inside
    # two steps wake everything: the outputs first, then what they multiply
    gradients = gradient(adam_step(params, gradients))
    for _ in range(2):
        params = adam_step(params, gradients)
        gradients = gradient(params)
    assert with_gradient(gradients) == set(flatten_dict(params, sep="."))


@pytest.mark.parametrize("layers", [1, 2])
def test_channel_mixing_of_the_paper_s_printed_initialiser_is_dead_forever(layers):
    """Appendix E prints W_o and channel mixing's W_v as the non-zero ones. With W_k = 0, relu(0)^2 and its derivative
    are zero, so all three matrices of channel mixing have zero gradient, at the start and after any step."""
    params, gradient = problem(layers)
    rng = np.random.default_rng(0)
    dead = set()
    for i in range(layers):
        for part, matrices in (
            ("att", ("key", "value", "receptance", "output")),
            ("ffn", ("key", "receptance", "value")),
        ):
            non_zero = {"att": "output", "ffn": "value"}[part]
            for name in matrices:
                kernel = params[f"blocks_{i}"][part][name]["kernel"]
                new = 2 * rng.standard_normal(kernel.shape) if name == non_zero else np.zeros(kernel.shape)
                params[f"blocks_{i}"][part][name]["kernel"] = new.astype(np.float32)
                dead |= {f"blocks_{i}.ffn.{name}.kernel"} if part == "ffn" else set()
    for step in range(4):
        gradients = gradient(params)
        alive = with_gradient(gradients)
        assert not alive & dead, step
        params = adam_step(params, gradients)
    assert f"blocks_{layers - 1}.att.value.kernel" in alive  # time mixing learns even so
