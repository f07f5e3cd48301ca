"""Initial tensors against the released formulas written out in NumPy, and the gradients of the first steps."""

import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from rwkv_jax.interop import to_official
from rwkv_jax.models import build, unstack
from rwkv_jax.models.layers import LayerNorm, embedding_init, orthogonal
from rwkv_jax.models.rwkv4 import kernel_init

V, D, L = 80, 32, 3
ROUNDING = 8 * 4 * np.finfo(np.float32).eps  # for a vector: values up to 8, a division, a power and a sum or two
TABLE = (200, 64)  # shape of the embeddings drawn without a model


class Orthogonal(NamedTuple):
    gain: float


class Normal(NamedTuple):
    deviation: float


def rwkv4(layer, layers, matrix_init="released"):
    """A layer as initialised by RWKV-LM (RWKV-v4neo): an array, or its distribution, by name."""
    i = np.arange(D)
    ratio01 = layer / (layers - 1) if layers > 1 else 0.0
    ratio10 = 1 - layer / layers
    vectors = {
        "att.time_decay": np.array([-5 + 8 * (h / (D - 1)) ** (0.7 + 1.3 * ratio01) for h in range(D)]),
        "att.time_first": np.array([math.log(0.3) + 0.5 * ((h + 1) % 3 - 1) for h in range(D)]),
        "att.time_mix_k": (i / D) ** ratio10,
        "att.time_mix_v": (i / D) ** ratio10 + 0.3 * ratio01,
        "att.time_mix_r": (i / D) ** (0.5 * ratio10),
        "ffn.time_mix_k": (i / D) ** ratio10,
        "ffn.time_mix_r": (i / D) ** ratio10,
    }
    names = ("att.key", "att.value", "att.receptance", "att.output", "ffn.key", "ffn.receptance", "ffn.value")
    drawn = {
        "released": {"att.value": Orthogonal(1), "ffn.key": Orthogonal(2)},  # sqrt(4 D / D)
        "printed": {"att.output": Normal(2), "ffn.value": Normal(2)},
    }
    return norm("ln1") | norm("ln2") | vectors | dict.fromkeys(names, np.zeros(())) | drawn[matrix_init]


def attention(layer, layers):
    """Orthogonal inputs, zero outputs; token shift with RWKV's mixes, the query's that of receptance."""
    like = rwkv4(layer, layers)
    mixes = {"att.time_mix_q": like["att.time_mix_r"]}
    mixes |= {name: like[name] for name in ("att.time_mix_k", "att.time_mix_v", "ffn.time_mix_k")}
    drawn = {f"att.{name}": Orthogonal(1) for name in ("query", "key", "value")} | {"ffn.key": Orthogonal(4.5**0.5)}
    return norm("ln1") | norm("ln2") | mixes | drawn | dict.fromkeys(("att.output", "ffn.value"), np.zeros(()))


def norm(name):
    return {f"{name}.scale": np.ones(()), f"{name}.bias": np.zeros(())}


def starts_of(*kinds, **fields):
    """Initial tensors of layers of these kinds, for instance "0.att.key", and of the parts around them."""
    around = (
        norm("ln0") | norm("ln_out") | {"head": Orthogonal(0.5 * math.sqrt(max(1, fields.get("vocab_size", V) / D)))}
    )
    return around | {
        f"{layer}.{name}": start for layer, kind in enumerate(kinds) for name, start in kind(layer, len(kinds)).items()
    }


def assert_starts(tensors, starts):
    """Check up to the rounding of the computation and of the tensor's dtype; another test checks the embedding."""
    assert tensors.keys() - {"emb"} == starts.keys()
    for name, start in starts.items():
        x, eps = np.float32(tensors[name]), float(jnp.finfo(tensors[name].dtype).eps)
        if isinstance(start, Orthogonal):
            smaller = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x  # the smaller of the two products is gain^2 I
            limit = start.gain**2 * max(1e-5, 2 * eps)
            np.testing.assert_allclose(smaller, start.gain**2 * np.eye(len(smaller)), atol=limit, err_msg=name)
        elif isinstance(start, Normal):
            np.testing.assert_allclose(x.std(), start.deviation, rtol=0.1, err_msg=name)
        else:
            limit = {"rtol": 0 if eps < 1e-6 else eps, "atol": ROUNDING}
            np.testing.assert_allclose(x, np.broadcast_to(start, x.shape), **limit, err_msg=name)


def make(name="rwkv4", **overrides):
    return build(name, **({"vocab_size": V, "dim": D, "num_layers": L} | overrides))


@functools.partial(jax.jit, static_argnums=0)
def init(model, seed):
    return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def initial(seed=0, **overrides):
    """Initial tensors by official-looking name, "0.att.key" for the kernel of layer 0, in either layout."""
    model = make(**overrides)
    params = jax.tree.map(np.asarray, init(model, seed))
    flat = flatten_dict(unstack(params) if model.scan else params, sep=".")
    rename = lambda name: name.removeprefix("blocks_").removesuffix(".kernel").removesuffix(".embedding")
    return {rename(name): x for name, x in flat.items()}


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("layers", "scan"), [(L, True), pytest.param(1, False, marks=pytest.mark.slow)])
def test_init_of_rwkv4_follows_the_released_formulas(layers, scan):
    tensors = initial(num_layers=layers, scan=scan)
    assert_starts(tensors, starts_of(*[rwkv4] * layers))
    assert 5.5e-4 < np.abs(tensors["emb"]).max() <= 6e-4  # "v4neo"


def test_init_of_a_stacked_hybrid_depends_on_depth_and_treats_attention_alike():
    fields = {"layers": ("attention", "rwkv4"), "num_layers": 4, "token_shift": True, "vocab_size": 16}
    tensors = initial(**fields, embedding_scale=2e-3)
    assert_starts(tensors, starts_of(attention, rwkv4, attention, rwkv4, vocab_size=16))
    assert 1.8e-3 < np.abs(tensors["emb"]).max() <= 2e-3


def test_init_of_an_unrolled_bfloat16_hybrid_keeps_decays_in_float32():
    fields = {"layers": ("rwkv4", "attention"), "num_layers": 2, "token_shift": True, "scan": False}
    tensors = initial(**fields, matrix_init="printed", embedding_init="normal", param_dtype="bfloat16")
    assert_starts(tensors, starts_of(functools.partial(rwkv4, matrix_init="printed"), attention))
    wide = {name for name, x in tensors.items() if x.dtype == np.float32}
    assert wide == {"0.att.time_decay", "0.att.time_first"}


def test_init_draws_other_matrices_for_every_layer_and_seed():
    stacked = [initial(seed)[f"{layer}.att.value"] for seed in (0, 1) for layer in range(L)]
    unrolled = initial(layers=("attention",), num_layers=2, scan=False)
    for a, b in itertools.combinations([*stacked, *(unrolled[f"{layer}.att.value"] for layer in (0, 1))], 2):
        assert np.abs(a - b).max() > 0.1


def test_init_of_stacked_layers_draws_the_numbers_of_version_0_1():
    """A seed in a config or a paper must keep its numbers, independent of the way a model is traced."""
    model = build("rwkv4", vocab_size=19, num_layers=3, dim=16)
    drawn = init(model, 0)["blocks"]["att"]["value"]["kernel"]
    np.testing.assert_allclose(np.asarray(drawn)[:, 0, 0], [-0.355276, 0.183897, 0.210737], atol=1e-5)


WITHOUT = {"receptance": False, "token_shift": False, "current_token": "plain", "embedding_norm": False}
WITHOUT_7 = dict.fromkeys(("in_context_rate", "value_residual", "bonus", "token_shift"), False)


@pytest.mark.parametrize(("kind", "without"), [("rwkv4", WITHOUT), ("rwkv7", WITHOUT_7)])
def test_init_of_a_variant_shares_the_draws_of_the_released_model(kind, without):
    """Effects are paired by the initial draw: removing a parameter must not shift the draws of the others."""
    released = initial(layers=(kind,))
    tensors = initial(layers=(kind,), **without)
    assert tensors.keys() < released.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, released[name], err_msg=name)


# ------------------------------------------------------------------------------------- initialiser functions


@functools.cache
def draws():
    """Values of the initialisers without a model, from one program."""

    @jax.jit
    def draw(seed):
        key = jax.random.key(seed)
        schemes = ("v4", "v4neo", "v5", "normal")
        tables = {scheme: embedding_init(scheme, None)(key, TABLE) for scheme in schemes}
        narrow = {scheme: embedding_init(scheme, None)(key, TABLE, jnp.bfloat16) for scheme in ("v4", "v4neo")}
        normal = (kernel_init("normal", "att.key"), make(head_init="normal").bind({}).head.kernel_init)
        return tables, narrow, [init(key, (64, 64), jnp.float32) for init in normal], orthogonal(0.5)(key, (D, 16))

    return jax.tree.map(np.asarray, draw(0))


def test_embedding_init_draws_the_scale_of_its_scheme():
    tables, narrow, *_ = draws()
    bounds = {"v4neo": 6e-4, "v5": 1e-4}
    deviations = {"v4": 1e-4, "normal": 0.02} | {scheme: bound / math.sqrt(3) for scheme, bound in bounds.items()}
    for scheme, deviation in deviations.items():
        np.testing.assert_allclose(tables[scheme].std(), deviation, rtol=0.02)
        np.testing.assert_allclose(tables[scheme].mean(), 0, atol=0.02 * deviation)
    for scheme, bound in bounds.items():
        assert 0.99 * bound < np.abs(tables[scheme]).max() <= bound
    gain = 1e-4 * math.sqrt(TABLE[0])
    np.testing.assert_allclose(tables["v4"].T @ tables["v4"], gain**2 * np.eye(TABLE[1]), atol=1e-5 * gain**2)
    for scheme, rounded in narrow.items():
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(rounded), tables[scheme], rtol=2**-8)


def test_kernel_init_normal_and_orthogonal_have_their_deviation_and_gain():
    *_, normal, narrowing = draws()
    for kernel in normal:
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    # the gain does not shrink for fewer outputs
    np.testing.assert_allclose(narrowing.T @ narrowing, 0.25 * np.eye(16), atol=1e-5)


def test_layer_norm_has_epsilon_1e_5_and_exact_variance():
    """Epsilon is 1e-5, which matters for embeddings, and the variance takes two passes: x - mean first."""
    far = 1000 + 1e-2 * np.random.default_rng(0).standard_normal((4, TABLE[1]), np.float32)
    x = np.concatenate([*(draws()[0][scheme] for scheme in ("v4", "v4neo", "v5")), far])
    params = {"scale": np.ones(TABLE[1], np.float32), "bias": np.zeros(TABLE[1], np.float32)}
    actual = np.asarray(jax.jit(LayerNorm().apply)({"params": params}, x))
    exact = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(actual, exact, atol=0.01)
    np.testing.assert_allclose(actual[:-4], exact[:-4], atol=1e-5)
    scales = [part.std() for part in np.split(actual[:-4], 3)]  # as `embedding_init` states them
    np.testing.assert_allclose(scales, (0.032, 0.109, 0.018), rtol=0.03)


# ---------------------------------------------------------------------------------------------- first steps


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params):
    """Gradient of the mean next-token loss on a fixed batch."""
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, 12))

    def loss(params):
        logits_BTV, _ = model.apply({"params": params}, tokens_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).mean()

    return jax.grad(loss)(params)


def with_gradient(**fields):
    """Names of the tensors with a non-zero gradient, before each of four steps of Adam's first size."""
    params = jax.tree.map(np.asarray, init(make(**fields), 0))
    for _ in range(4):
        found = jax.tree.map(np.asarray, gradient(make(), params))
        yield {name for name, x in flatten_dict(unstack(found), sep=".").items() if x.any()}
        params = jax.tree.map(lambda p, g: p - np.float32(1e-2) * np.sign(g), params, found)


def test_init_has_gradients_at_outputs_first_and_everywhere_after_two_steps():
    outside = {"emb.embedding", "head.kernel", *(f"{n}.{x}" for n in ("ln0", "ln_out") for x in ("scale", "bias"))}
    inside = {f"blocks_{i}.{name}.kernel" for i in range(L) for name in ("att.output", "ffn.value")}
    # first the outputs, then the tensors that they multiply
    first, *_, last = with_gradient()
    assert first == outside | inside
    assert last == set(flatten_dict(unstack(init(make(), 0)), sep="."))


def test_matrix_init_printed_leaves_channel_mixing_without_a_gradient():
    """Appendix E prints W_o and channel mixing's W_v as the non-zero matrices. With W_k = 0, relu(0)^2 and its
    derivative are zero, so all three matrices of channel mixing have zero gradient, at the start and after any step.
    """
    ffn = {f"blocks_{i}.ffn.{name}.kernel" for i in range(L) for name in ("key", "receptance", "value")}
    for alive in with_gradient(matrix_init="printed"):
        assert not alive & ffn
    assert f"blocks_{L - 1}.att.value.kernel" in alive  # time mixing learns nevertheless


@pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])
def test_init_of_later_versions_follows_the_released_trainers(kind):
    """Compared with the initial tensors of the released trainers: vectors are equal, matrices have the same gains."""
    with np.load(Path(__file__).parents[1] / "goldens" / f"official_trajectory{kind[-1]}.npz") as arrays:
        theirs = {k.removeprefix("init/"): x for k, x in arrays.items() if k.startswith("init/")}
    ranks = (32,) * 4 if kind == "rwkv7" else None
    model = build(kind, vocab_size=64, dim=64, num_layers=3, head_size=32, low_ranks=ranks)
    ours = to_official(init(model, 0))
    assert theirs.keys() - ours.keys() == {f"blocks.0.att.v{i}" for i in range(3)} & theirs.keys()
    drawn = lambda name: name.endswith((".weight", "2")) and ".ln" not in name and "ln_" not in name
    for name, x in ours.items():
        if name == "emb.weight" or name.endswith(("maa_w2", "decay_w2")):  # uniform
            np.testing.assert_allclose(
                [x.std(), abs(x).max()], [theirs[name].std(), abs(theirs[name]).max()], rtol=0.1
            )
        elif drawn(name):
            gains = [np.linalg.svd(tensor, compute_uv=False) for tensor in (x, theirs[name])]
            np.testing.assert_allclose(*gains, rtol=2e-3, err_msg=name)  # those of RWKV-6 are rounded to 12 bits
        else:
            np.testing.assert_allclose(x, theirs[name], atol=ROUNDING, err_msg=name)
