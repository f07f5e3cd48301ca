"""Trees of arrays to save and restore."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import SingleDeviceSharding


@struct.dataclass
class TrainState:
    step: Any
    params: Any
    opt_state: Any
    skipped: Any


def train_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    drawn = lambda *shape, dtype=np.float32: rng.normal(size=shape).astype(dtype)
    params = {
        "emb": {"embedding": drawn(16, width)},
        "blocks": {"att": {"time_decay": drawn(2, width)}},
        "head": {"kernel": drawn(width, 16, dtype=jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.tree.map(lambda x: drawn(*x.shape, dtype=x.dtype) if x.ndim else x.dtype.type(seed), shapes)
    return jax.device_put(TrainState(np.int32(seed), params, opt_state, np.int32(0)))


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree):
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def files_of(folder, step):
    return sorted(file for file in (folder / str(step)).rglob("*") if file.is_file())
