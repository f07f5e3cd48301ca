"""Small models of every kind with parameters drawn by NumPy, for tests of values rather than sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.models import LM, build

V, D, L = 11, 8, 2
KINDS = {
    "rwkv4": {"name": "rwkv4"},
    "transformer": {"name": "transformer", "token_shift": True},
    "rwkv5": {"name": "rwkv5"},
    "rwkv6": {"name": "rwkv6"},
    "rwkv7": {"name": "rwkv7"},
    "lstm": {"name": "lstm"},
    "hybrid": {"name": "rwkv4", "layers": ("rwkv4", "attention"), "num_layers": 4},
    "hybrid of three": {"name": "rwkv7", "layers": ("rwkv4", "rwkv7", "attention"), "num_layers": 6},
}


def make(kind, **overrides) -> LM:
    small = {"vocab_size": V, "dim": D, "num_layers": L, "head_size": 4, "matmul_precision": "highest"}
    return build(**(small | KINDS[kind] | overrides))


@functools.cache
def shapes_of(model):
    """Shapes and dtypes of the parameters, without compiling anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(model.init, key, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


@functools.cache
def made(kind, **overrides):
    """(model, params), with noise on every tensor: initially most matrices are zero and hide the tensors they
    multiply.

    Norms, mixes and decays have their initial values, and 0.3 of noise.
    """
    model = make(kind, **overrides)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, channels = path[-1].key, np.linspace(0, 1, leaf.shape[-1])
        starts = {"scale": 1.0, "time_decay": -5 + 8 * channels, "time_first": np.log(0.3)}
        mixes = name.startswith(("time_mix", "time_maa", "x_")) and leaf.ndim < 3
        start = channels if mixes else starts.get(name, 0.0)
        return (start + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def drawn(model, seed=1, scale=0.5):
    """(model, params) without zeros, and with a long memory."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        drawn = scale * rng.standard_normal(leaf.shape, np.float32)
        return ((-4 if path[-1].key == "time_decay" else 0) + drawn).astype(leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes_of(model))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens_BT, state=None, reset_BT=None, valid_BT=None):
    return model.apply({"params": params}, tokens_BT, state, reset_BT=reset_BT, valid_BT=valid_BT)


def one_by_one(model, params, tokens_BT, state):
    """(logits [B, T, V], state after the last token) of tokens that are read one at a time."""
    logits = []
    for t in range(tokens_BT.shape[1]):
        logits_B1V, state = forward(model, params, tokens_BT[:, t : t + 1], state)
        logits.append(logits_B1V)
    return np.concatenate(logits, axis=1), state


def token_by_token(model, params, tokens_BT, reset_BT, valid_BT):
    """(logits [B, T, V], state) of passes with one valid token each: all run the program of all tokens."""
    state, steps = model.init_state(len(tokens_BT)), []
    for t in range(tokens_BT.shape[1]):
        now = valid_BT & (np.arange(tokens_BT.shape[1]) == t)[None]
        step_BTV, state = forward(model, params, tokens_BT, state, reset_BT, now)
        steps.append(step_BTV[:, t])
    return np.stack(steps, axis=1), state


def layer_norm(x, p):
    """The norm of every model in NumPy: epsilon 1e-5, exact variance."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape, dtype=np.int32)
