"""Initial tensors against the released formulas written out in NumPy, and the gradients at the first steps."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rwkv_jax.models import build, unstack
from rwkv_jax.models.layers import LayerNorm, embedding_init, orthogonal
from rwkv_jax.models.rwkv4 import kernel_init

slow = pytest.mark.slow
V, D, L = 80, 32, 3
ROUNDING = 8 * 4 * np.finfo(np.float32).eps  # of a vector: values up to 8, a division, a power and a sum or two
TABLE = (200, 64)  # of the embeddings that are drawn without a model
MATRICES = {"att": ("key", "value", "receptance", "output"), "ffn": ("key", "receptance", "value")}
ZERO = ("att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value")
# hybrids, stacked and unrolled, with the fields that the first model leaves at their defaults
STACKED = {
    "layers": ("attention", "rwkv4"),
    "num_layers": 4,
    "token_shift": True,
    "vocab_size": 16,
    "embedding_scale": 2e-3,
}
UNROLLED = {
    "layers": ("rwkv4", "attention"),
    "num_layers": 2,
    "token_shift": True,
    "scan": False,
    "matrix_init": "printed",
    "embedding_init": "normal",
    "param_dtype": "bfloat16",
}


def make(name="rwkv4", **overrides):
    return build(name, **({"vocab_size": V, "dim": D, "num_layers": L} | overrides))


@functools.partial(jax.jit, static_argnums=0)
def init(model, seed):
    return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def initial(seed=0, **overrides):
    """Initial tensors by official-looking name, "0.att.key" for the kernel of layer 0, whatever the layout."""
    model = make(**overrides)
    params = jax.tree.map(np.asarray, init(model, seed))
    flat = flatten_dict(unstack(params) if model.scan else params, sep=".")
    rename = lambda name: name.removeprefix("blocks_").removesuffix(".kernel").removesuffix(".embedding")
    return {rename(name): x for name, x in flat.items()}


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


def shifts_of_attention(layer, layers):
    """Token shift in an attention layer: RWKV's mixes, the query's that of receptance."""
    like = vectors(layer, layers)
    names = {"att.time_mix_q": "att.time_mix_r"} | {
        x: x for x in ("att.time_mix_k", "att.time_mix_v", "ffn.time_mix_k")
    }
    return {name: like[its] for name, its in names.items()}


def assert_close(actual, expected, message):
    """Equal up to the rounding of the computation and of the tensor's dtype."""
    relative = 0 if actual.dtype == np.float32 else float(jnp.finfo(actual.dtype).eps)
    np.testing.assert_allclose(np.float32(actual), expected, rtol=relative, atol=ROUNDING, err_msg=message)


def assert_orthogonal(kernel, gain):
    """K K^T = gain^2 I, or K^T K where that is the smaller of the two."""
    smaller = kernel @ kernel.T if kernel.shape[0] <= kernel.shape[1] else kernel.T @ kernel
    np.testing.assert_allclose(smaller, gain**2 * np.eye(len(smaller)), atol=1e-5 * gain**2)


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("layers", "scan"), [(L, True), *(pytest.param(*case, marks=slow) for case in ((L, False), (1, True), (1, False)))]
)
def test_rwkv4_tensors_follow_the_released_formulas(layers, scan):
    tensors = dict(initial(num_layers=layers, scan=scan))
    for layer in range(layers):
        for name, want in vectors(layer, layers).items():
            assert_close(tensors.pop(f"{layer}.{name}"), want, name)
        for name in ZERO:
            assert not tensors.pop(f"{layer}.{name}").any(), name
        assert_orthogonal(tensors.pop(f"{layer}.att.value"), 1.0)
        assert_orthogonal(tensors.pop(f"{layer}.ffn.key"), 2.0)  # sqrt(4D / D)
    assert_orthogonal(tensors.pop("head"), 0.5 * math.sqrt(V / D))
    for name in ("ln0", "ln_out"):
        np.testing.assert_array_equal(tensors.pop(f"{name}.scale"), np.ones(D))
        np.testing.assert_array_equal(tensors.pop(f"{name}.bias"), np.zeros(D))
    assert 5.5e-4 < np.abs(tensors.pop("emb")).max() <= 6e-4  # "v4neo"
    assert not tensors


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=slow)])
def test_every_layer_and_every_seed_draws_its_own_matrices(scan):
    drawn = [
        initial(seed, num_layers=L, scan=scan)[f"{layer}.{name}"]
        for seed in (0, 1)
        for layer in range(L)
        for name in ("att.value", "ffn.key")
    ]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert a.shape != b.shape or np.abs(a - b).max() > 0.1


def test_stacked_layers_draw_what_they_have_always_drawn_from_a_seed():
    """A seed in a config or a paper names these numbers, however a model is traced; as of version 0.1."""
    model = build("rwkv4", vocab_size=19, num_layers=3, dim=16)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    drawn = params["blocks"]["att"]["value"]["kernel"][:, 0, 0]
    np.testing.assert_allclose(drawn, [-0.355276, 0.183897, 0.210737], atol=1e-5)


def test_stacked_hybrid_layers_know_their_depth_and_attention_starts_as_rwkv4():
    """Attention: orthogonal inputs, zero outputs, RWKV's own mixes in the token shift."""
    tensors = initial(**STACKED)
    for layer in (0, 2):
        for name, want in shifts_of_attention(layer, 4).items():
            assert_close(tensors[f"{layer}.{name}"], want, name)
        for name in ("query", "key", "value"):
            assert_orthogonal(tensors[f"{layer}.att.{name}"], 1.0)
        assert_orthogonal(tensors[f"{layer}.ffn.key"], math.sqrt(4.5))
        assert not tensors[f"{layer}.att.output"].any() and not tensors[f"{layer}.ffn.value"].any()
        for name, want in vectors(layer + 1, 4).items():
            assert_close(tensors[f"{layer + 1}.{name}"], want, name)
    assert_orthogonal(tensors["head"], 0.5)  # as V is below D
    assert 1.8e-3 < np.abs(tensors["emb"]).max() <= 2e-3


def test_unrolled_bfloat16_hybrid_layers_know_their_depth_and_keep_decays_in_float32():
    tensors = initial(**UNROLLED)
    wide = {name for name, x in tensors.items() if x.dtype == np.float32}
    assert wide == {"0.att.time_decay", "0.att.time_first"}
    for layer, expected in enumerate((vectors(0, 2), shifts_of_attention(1, 2))):
        for name, want in expected.items():
            assert_close(tensors[f"{layer}.{name}"], want, name)
    kernels = {name: np.float32(x) for name, x in tensors.items() if x.ndim == 2}
    drawn = {"emb": 0.02, "0.att.output": 2.0, "0.ffn.value": 2.0}
    for name, std in drawn.items():
        np.testing.assert_allclose(kernels[name].std(), std, rtol=0.1, err_msg=name)
    orthogonal = {"head", *(f"1.{name}" for name in ("att.query", "att.key", "att.value", "ffn.key"))}
    assert {name for name, x in kernels.items() if x.any()} == drawn.keys() | orthogonal
    for a in orthogonal:
        for b in orthogonal - {a}:
            assert kernels[a].shape != kernels[b].shape or np.abs(kernels[a] - kernels[b]).max() > 0.1


@slow
@pytest.mark.parametrize(("layers", "scan"), [(("rwkv4", "attention"), True), (("attention", "rwkv4"), False)])
def test_hybrid_layers_of_either_order_know_their_depth(layers, scan):
    tensors = initial(layers=layers, num_layers=4, scan=scan)
    for layer in range(4):
        if layers[layer % 2] == "attention":
            assert f"{layer}.att.query" in tensors
        else:
            for name, want in vectors(layer, 4).items():
                assert_close(tensors[f"{layer}.{name}"], want, name)


@slow
def test_transformer_starts_as_its_layers_do_in_a_hybrid():
    tensors = initial(name="transformer", token_shift=True)
    for layer in range(L):
        for name, want in shifts_of_attention(layer, L).items():
            assert_close(tensors[f"{layer}.{name}"], want, name)
        for name in ("query", "key", "value"):
            assert_orthogonal(tensors[f"{layer}.att.{name}"], 1.0)
    assert_orthogonal(tensors["head"], 0.5 * math.sqrt(V / D))


def test_variant_shares_the_initial_draws_of_the_released_model():
    """Effects are paired by the initial draw: a parameter that is gone must not shift the others' draws."""
    released = initial(num_layers=L, scan=True)
    without = {"receptance": False, "token_shift": False, "current_token": "plain", "embedding_norm": False}
    tensors = initial(num_layers=L, scan=True, **without)
    assert tensors.keys() < released.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, released[name], err_msg=name)


@slow
@pytest.mark.parametrize(
    "fields", [{"receptance": False}, {"token_shift": False, "current_token": "plain", "embedding_norm": False}]
)
def test_each_variant_shares_the_initial_draws_of_the_released_model(fields):
    released = initial(num_layers=L, scan=True)
    for name, x in initial(num_layers=L, scan=True, **fields).items():
        np.testing.assert_array_equal(x, released[name], err_msg=name)


# ------------------------------------------------------------------------------------- initialiser functions


@functools.cache
def draws():
    """What the initialisers return without a model, of one program."""

    @jax.jit
    def draw(seed):
        key = jax.random.key(seed)
        tables = {scheme: embedding_init(scheme, None)(key, TABLE) for scheme in ("v4", "v4neo", "v5", "normal")}
        tables["v4 bfloat16"] = embedding_init("v4", None)(key, TABLE, jnp.bfloat16)
        kernels = {
            f"{scheme} {part}.{name}": kernel_init(scheme, f"{part}.{name}")(key, (64, 64), jnp.float32)
            for scheme in ("printed", "normal")
            for part, names in MATRICES.items()
            for name in names
        }
        head = make(head_init="normal").bind({}).head.kernel_init
        return (
            tables | kernels | {"normal head": head(key, (64, 64), jnp.float32), "gain": orthogonal(0.5)(key, (D, 16))}
        )

    return jax.tree.map(np.asarray, draw(0))


@functools.cache
def normed():
    """(three embeddings and values far from zero, what `LayerNorm` returns for them)."""
    far = 1000 + 1e-2 * np.random.default_rng(0).standard_normal((4, TABLE[1]), np.float32)
    x = np.concatenate([draws()["v4"], draws()["v4neo"], draws()["v5"], far])
    params = {"scale": np.ones(TABLE[1], np.float32), "bias": np.zeros(TABLE[1], np.float32)}
    return x, np.asarray(jax.jit(LayerNorm().apply)({"params": params}, x))


@pytest.mark.parametrize(
    ("scheme", "deviation"),
    [("v4", 1e-4), ("v4neo", 6e-4 / math.sqrt(3)), ("v5", 1e-4 / math.sqrt(3)), ("normal", 0.02)],
)
def test_embedding_init_draws_the_scale_of_its_scheme(scheme, deviation):
    table = draws()[scheme]
    np.testing.assert_allclose(table.std(), deviation, rtol=0.02)
    np.testing.assert_allclose(table.mean(), 0, atol=0.02 * deviation)
    if scheme == "v4":
        assert_orthogonal(table, 1e-4 * math.sqrt(TABLE[0]))
        rounded = draws()["v4 bfloat16"]
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(rounded), table, rtol=2**-8)
    elif scheme != "normal":
        bound = deviation * math.sqrt(3)
        assert 0.99 * bound < np.abs(table).max() <= bound


def test_kernel_init_of_printed_and_normal_schemes():
    printed = {"printed att.output": 2.0, "printed ffn.value": 2.0}
    kernels = {name: x for name, x in draws().items() if name.startswith(("printed ", "normal "))}
    assert len(kernels) == 2 * 7 + 1  # with the head, which "normal" draws too
    for name, x in kernels.items():
        std = printed.get(name, 0.0 if name.startswith("printed") else 0.02)
        np.testing.assert_allclose(x.std(), std, rtol=0.05, err_msg=name)


def test_orthogonal_gain_does_not_shrink_for_fewer_outputs():
    assert_orthogonal(draws()["gain"], 0.5)


def test_layer_norm_matches_torch():
    """Epsilon 1e-5 and the variance in two passes: x - mean first."""
    x, actual = normed()
    exact = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(actual, exact, atol=0.01)
    np.testing.assert_allclose(actual[:-4], exact[:-4], atol=1e-5)  # embeddings, where epsilon decides
    # their three scales differ, as epsilon is larger than their variances
    scales = [part.std() for part in np.split(actual[:-4], 3)]
    np.testing.assert_allclose(scales, (0.032, 0.109, 0.018), rtol=0.03)
    assert isinstance(LayerNorm(), nn.LayerNorm)


# ---------------------------------------------------------------------------------------------- first steps


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params):
    """Of the mean next-token loss on a fixed batch."""
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, 12))

    def loss(params):
        logits_BTV, _ = model.apply({"params": params}, tokens_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).mean()

    return jax.grad(loss)(params)


def steps(model, params, count):
    """Gradients by name, one layer after the other, before each of `count` steps of Adam's first size."""
    for _ in range(count):
        found = jax.tree.map(np.asarray, gradient(model, params))
        yield flatten_dict(unstack(found) if model.scan else found, sep=".")
        params = jax.tree.map(lambda p, g: p - np.float32(1e-2) * np.sign(g), params, found)


def with_gradient(gradients):
    return {name for name, x in gradients.items() if x.any()}


@pytest.mark.parametrize("layers", [L, pytest.param(1, marks=slow)])
def test_initial_gradients_are_of_the_outputs_and_reach_every_tensor_after_two_steps(layers):
    model = make(num_layers=layers, scan=True)
    outside = {"emb.embedding", "head.kernel", *(f"{n}.{x}" for n in ("ln0", "ln_out") for x in ("scale", "bias"))}
    inside = {f"blocks_{i}.{name}.kernel" for i in range(layers) for name in ("att.output", "ffn.value")}
    # the outputs first, then what they multiply
    first, *_, last = steps(model, jax.tree.map(np.asarray, init(model, 0)), 4)
    assert with_gradient(first) == outside | inside
    assert with_gradient(last) == set(last)


@pytest.mark.parametrize("layers", [L, pytest.param(1, marks=slow)])
@pytest.mark.parametrize("scheme", ["printed", "normal"])
def test_printed_initialiser_leaves_channel_mixing_without_a_gradient(layers, scheme):
    """Appendix E prints W_o and channel mixing's W_v as the non-zero ones. With W_k = 0, relu(0)^2 and its derivative
    are zero, so all three matrices of channel mixing have zero gradient, at the start and after any step."""
    model, rng = make(num_layers=layers, scan=True), np.random.default_rng(0)
    flat = flatten_dict(jax.tree.map(np.asarray, init(model, 0)))
    for part, names in MATRICES.items():
        for name in names:
            path = ("blocks", part, name, "kernel")
            std = 0.02 if scheme == "normal" else 2 if name == {"att": "output", "ffn": "value"}[part] else 0
            flat[path] = std * rng.standard_normal(flat[path].shape, np.float32)
    ffn = {f"blocks_{i}.ffn.{name}.kernel" for i in range(layers) for name in MATRICES["ffn"]}
    for gradients in steps(model, unflatten_dict(flat), 4):
        alive = with_gradient(gradients)
        assert alive & ffn == (set() if scheme == "printed" else ffn)
    assert f"blocks_{layers - 1}.att.value.kernel" in alive  # time mixing learns even so
