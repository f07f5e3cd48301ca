"""Models that tests of generation continue texts with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import drawn

import rwkv_jax

LAYERS = {"rwkv4": ("rwkv4",), "transformer": ("attention",), "hybrid": ("rwkv4", "attention")}
# The hybrid has all that the transformer has; the transformer by itself belongs to make test-all.
KINDS = pytest.mark.parametrize("kind", ["rwkv4", "hybrid", pytest.param("transformer", marks=pytest.mark.slow)])
FIELDS = {"vocab_size": 256, "dim": 16, "matmul_precision": "highest"}


@functools.cache
def case(kind):
    return drawn(rwkv_jax.build("rwkv4", layers=LAYERS[kind], num_layers=len(LAYERS[kind]), **FIELDS))


@functools.cache
def unstacked(kind):
    model, params = case(kind)
    return model.clone(scan=False), rwkv_jax.unstack(params)


def ids(length, seed=2):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def cycling(text):
    """(model, params) of bigrams, with blocks that are zero: after "." it goes round and round this text of bytes,
    in which no byte may come twice."""
    cycle = list(text.encode())
    model = rwkv_jax.build("rwkv4", num_layers=1, **FIELDS | {"dim": 256})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params["emb"]["embedding"] = np.eye(256, dtype=np.float32)
    params["ln0"]["scale"] = params["ln_out"]["scale"] = np.ones(256, np.float32)
    params["head"]["kernel"][cycle, cycle[1:] + cycle[:1]] = 1
    return model, params
