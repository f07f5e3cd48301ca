"""A short fingerprint of a model's weights, kept beside adapters and states that belong to them."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rwkv_jax.models import unstack

SAMPLES = 64  # values of a parameter that its fingerprint includes


def fingerprint(model, params) -> str:
    """Return the SHA-256, in hex, of names, shapes and some values of the parameters, and of the ablation switches.

    It is the same for both layouts of the parameters, and in float32 and bfloat16: values are rounded to bfloat16
    first. Weights rounded from float32 to float16 usually have another one, as their values are rounded twice.
    """
    layers = "blocks" in params
    stacked = lambda path: layers and path[0].key == "blocks"

    def shape(path, x):
        """Return the shape as an array, with one row a layer if x is stacked."""
        return np.tile(x.shape[1:], (len(x), 1)) if stacked(path) else np.array(x.shape)

    def sample(path, x):
        own = x.shape[1:] if stacked(path) else x.shape
        places = np.unravel_index(np.linspace(0, np.prod(own, dtype=int) - 1, SAMPLES).astype(int), own)
        found = x[:, *places] if stacked(path) else x[places]
        if not getattr(found, "is_fully_addressable", True):
            found = multihost_utils.process_allgather(found, tiled=True)
        return np.asarray(found).astype(jnp.bfloat16)

    trees = [jax.tree_util.tree_map_with_path(part, params) for part in (shape, sample)]
    shapes, samples = (unstack(tree) if layers else tree for tree in trees)
    parts = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(samples), strict=True)
    found = sorted((jax.tree_util.keystr(path), size.tolist(), part.tobytes().hex()) for (path, size), part in parts)
    unseen = [kind.unseen(config) for _, kind, config in model.unit]
    unseen = next((value for value in unseen if value is not None), None)
    switches = sorted(model.variant.items())
    return hashlib.sha256(json.dumps([unseen, found, *switches]).encode()).hexdigest()
