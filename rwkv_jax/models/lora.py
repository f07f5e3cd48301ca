"""Low-rank adapters (LoRA, arXiv:2106.09685): W + (alpha / rank) A B in place of W, where only A and B are trained.

Adapters are a tree like the parameters with two leaves beside each adapted kernel [in, out]: `lora_a` [in, rank] and
`lora_b` [rank, out], stacked [L, ...] where the kernel is. Joined to the parameters, they make every model
compute x W + (x A) B (`layers.Linear`), which never forms A B.
"""

import re

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rwkv_jax.models.lm import stacked_name


def init(key, params, rank: int, targets: str):
    """Initial adapters, a no-op, float32 at least: A uniform in +-in^-1/2 (as in loralib), B zero.

    Args:
        targets: a regular expression over the paths of kernels, such as "blocks/att/key/kernel" (all layers).

    Raises:
        ValueError: `targets` matches none.
    """
    kernels = {path: x for path, x in flatten_dict(params).items() if path[-1] == "kernel"}
    found = lambda name: re.search(targets, name) or re.search(targets, stacked_name(name))
    chosen = {path: x for path, x in kernels.items() if found("/".join(path))}
    if not chosen:
        known = ", ".join(sorted("/".join(path) for path in kernels))
        raise ValueError(f"LoRA targets {targets!r} match no kernel, expected some of {known}")
    out = {}
    for i, (path, x) in enumerate(sorted(chosen.items())):
        *stacked, n_in, n_out = x.shape
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        bound = n_in**-0.5
        shape = (*stacked, n_in, rank)
        out[*path[:-1], "lora_a"] = jax.random.uniform(jax.random.fold_in(key, i), shape, dtype, -bound, bound)
        out[*path[:-1], "lora_b"] = jnp.zeros((*stacked, rank, n_out), dtype)
    return unflatten_dict(out)


def join(params, adapters, alpha: float):
    """Parameters with adapters scaled by alpha / rank, as a model takes them."""
    scaled = {path: _scale(x, alpha) * x if path[-1] == "lora_b" else x for path, x in flatten_dict(adapters).items()}
    return unflatten_dict(flatten_dict(params) | scaled)


def merge(params, adapters, alpha: float):
    """Parameters of the equivalent plain model: W + (alpha / rank) A B, computed in float32 at least, rounded once
    to the dtype of W and sharded as W is.

    Raises:
        ValueError: a sum is beyond the range of that dtype.
    """
    flat, pairs = flatten_dict(params), flatten_dict(adapters)
    for path, b in pairs.items():
        if path[-1] == "lora_b":
            w, a = flat[*path[:-1], "kernel"], pairs[*path[:-1], "lora_a"]
            add = jax.jit(_added, out_shardings=(w.sharding, None))
            flat[*path[:-1], "kernel"], lost = add(w, a, b, _scale(b, alpha))
            if lost:
                name, dtype = "/".join(path[:-1]), w.dtype.name
                raise ValueError(f"{name} with its adapters holds {lost:g}, beyond the range of {dtype}")
    return unflatten_dict(flat)


def _scale(b, alpha):
    return alpha / b.shape[-2]


def _added(w, a, b, scale):
    wide = jnp.promote_types(w.dtype, jnp.float32)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
    exact = w.astype(wide) + scale * product
    merged = exact.astype(w.dtype)
    return merged, jnp.where(jnp.isfinite(exact) & ~jnp.isfinite(merged), jnp.abs(exact), 0).max()
