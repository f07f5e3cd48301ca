"""Small models of every kind, for tests of values rather than of sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.models import LM, build

V, D, L = 11, 8, 2
KINDS = {
    "rwkv4": {"name": "rwkv4"},
    "transformer": {"name": "transformer", "token_shift": True},
    "lstm": {"name": "lstm"},
    "hybrid": {"name": "rwkv4", "layers": ("rwkv4", "attention"), "num_layers": 4},
}


def make(kind, **overrides) -> LM:
    small = {"vocab_size": V, "dim": D, "num_layers": L, "head_size": 4, "matmul_precision": "highest"}
    return build(**(small | KINDS[kind] | overrides))


@functools.cache
def made(kind, **overrides):
    """(model, params), every tensor shaken: at the start most matrices are zero and hide what they multiply."""
    model = make(kind, **overrides)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return model, jax.tree.unflatten(tree, leaves)


def drawn(model, seed=1, scale=0.5):
    """(model, params) with which nothing is zero, and that remember long."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return (-4 if path[-1].key == "time_decay" else 0) + scale * rng.standard_normal(leaf.shape, np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens_BT, state=None, reset_BT=None, valid_BT=None):
    return model.apply({"params": params}, tokens_BT, state, reset_BT=reset_BT, valid_BT=valid_BT)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape, dtype=np.int32)
