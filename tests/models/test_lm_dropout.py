"""Dropout: its places in a model, and a mask of its own for every layer."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from small import made, make, shapes_of, tokens


def norm_inputs(model, params, ids, **rngs):
    """(inputs of the norms by name, logits), while tracing; inputs inside a scan over layers cannot leave it."""
    seen = {}

    def record(call, args, kwargs, context):
        name = context.module.name
        if isinstance(context.module, nn.LayerNorm) and (not model.scan or name in ("ln0", "ln_out")):
            seen[name] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        logits, _ = model.apply({"params": params}, ids, rngs=rngs)
    return seen, logits


@pytest.mark.parametrize("kind", ["rwkv4", "transformer"])
def test_dropout_with_a_key_is_on_the_embedding_and_after_each_add(kind):
    one = {"num_layers": 1, "scan": False}
    plain, params = made(kind, **one)
    dropped, ids = make(kind, **one, dropout=0.5), tokens(8, 32)

    @jax.jit
    def run(params, key):
        without, with_key = norm_inputs(plain, params, ids), norm_inputs(dropped, params, ids, dropout=key)
        return without, norm_inputs(dropped, params, ids)[1], with_key[0]

    (without, logits), no_key, seen = jax.tree.map(np.asarray, run(params, jax.random.key(0)))
    np.testing.assert_array_equal(no_key, logits)
    zeros = {name: np.mean(x == 0) for name, x in seen.items()}
    assert zeros.keys() == {"ln0", "ln1", "ln2", "ln_out"} and zeros["ln1"] == 0
    assert all(0.45 < zeros[name] < 0.55 for name in ("ln0", "ln2", "ln_out"))
    kept = seen["ln0"] != 0
    np.testing.assert_allclose(seen["ln0"][kept], 2 * without["ln0"][kept], rtol=1e-6)


def test_dropout_draws_a_mask_of_its_own_for_every_layer():
    model = make("rwkv4", dropout=0.5, num_layers=3)
    start = lambda path, x: np.full(x.shape, path[-1].key not in ("kernel", "bias"), x.dtype)
    params = jax.tree_util.tree_map_with_path(start, shapes_of(model))  # every branch adds zero
    run = jax.jit(lambda params, key: norm_inputs(model, params, tokens(8, 32), dropout=key)[0])
    seen = run(params, jax.random.key(0))
    # six independent masks keep 1/64 of LN0's output, the same mask six times would keep half
    assert 1 / 128 < np.mean(np.asarray(seen["ln_out"]) != 0) < 1 / 32
