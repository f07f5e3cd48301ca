"""Fingerprints of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generating import case, unstacked

from rwkv_jax.interop import fingerprint

BOTH = pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])


@BOTH
def test_fingerprint_is_independent_of_layout_and_dtype(kind):
    model, params = case(kind)
    expected = fingerprint(model, params)
    assert fingerprint(*unstacked(kind)) == expected == fingerprint(model, jax.tree.map(jnp.asarray, params))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert fingerprint(model.clone(dtype="bfloat16", param_dtype="bfloat16"), half) == expected


@BOTH
def test_fingerprint_differs_between_models(kind):
    model, params = unstacked(kind)
    seen = {fingerprint(model, params)}
    leaves, tree = jax.tree.flatten(params)
    for i in range(len(leaves)):
        changed = [np.asarray(x * 1.02 if j == i else x) for j, x in enumerate(leaves)]
        seen.add(fingerprint(model, jax.tree.unflatten(tree, changed)))
    if "attention" in model.layers:
        seen.add(fingerprint(model.clone(head_size=4), params))
    assert len(seen) == 1 + len(leaves) + ("attention" in model.layers)
