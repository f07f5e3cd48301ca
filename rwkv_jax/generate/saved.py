"""Contexts as files: safetensors, with the text they have read and the fingerprint of their model."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.generate.context import CACHE_STEP, Context, cache_axes, check
from rwkv_jax.interop import safetensors_file
from rwkv_jax.models import unstack

FORMAT = "rwkv_jax context 1"
SAMPLES = 64  # numbers of a parameter that its fingerprint looks at


def save_context(path, context: Context, model, params, text: str | None = None) -> None:
    """Write a context of this model, and the text that it has read, to `path`, whole or not at all."""
    check(model, context, len(context.logits_BV))
    chosen = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in ("parent", "name")}
    metadata = {"format": FORMAT, "fingerprint": fingerprint(model, params), "model": json.dumps(chosen)}
    if text is not None:
        metadata["text"] = text
    safetensors_file.write(path, _named(context), metadata)


def load_context(path, model, params) -> tuple[Context, str | None]:
    """The context at `path` and the text that it has read, None where it was saved without one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a context, is damaged, or is one of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a saved context")
    arrays, metadata = safetensors_file.read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved context, or one of another version: expected {FORMAT!r}")
    if metadata.get("fingerprint") != fingerprint(model, params):
        raise ValueError(f"{path} is the context of another model: {metadata.get('model')}")
    return _context(path, model, arrays), metadata.get("text")


def _context(path, model, arrays) -> Context:
    """The arrays in the form of the model's contexts, with its dtypes and whatever length their caches have."""
    B = len(arrays.get("logits_BV", ()))
    wanted = jax.eval_shape(lambda: model.init_state(B, max_length=CACHE_STEP))
    wanted = Context(wanted, jax.ShapeDtypeStruct((B, model.vocab_size), jnp.promote_types(model.dtype, jnp.float32)))
    shapes = _named(wanted)
    if B == 0 or arrays.keys() != shapes.keys():
        raise ValueError(f"{path} is damaged: its arrays are not those of a context")
    for name, shape in shapes.items():
        if jnp.issubdtype(arrays[name].dtype, jnp.floating) != jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"{path} is damaged: {name} is {arrays[name].dtype}, expected {shape.dtype}")
    leaves = [jnp.array(arrays[name], shape.dtype) for name, shape in shapes.items()]
    context = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    try:
        check(model, context, B)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    leaves = zip(jax.tree.leaves(context.state), cache_axes(model), strict=True)
    slots = {x.shape[axis] for x, grows in leaves for axis in grows}
    counts = np.array([(c.start_B, c.length_B) for c in (getattr(e, "cache", None) for e in context.state) if c])
    if len(slots) > 1 or (counts < 0).any() or (counts > max(slots, default=0)).any():
        raise ValueError(f"{path} is damaged: its caches are not those of one text")
    return context


def _named(context: Context) -> dict:
    """Leaves by their path: "state.3.cache.k_BHSK"."""
    join = lambda path: ".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)
    return {join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(context)}


def fingerprint(model, params) -> str:
    """SHA-256, in hex, of what tells models apart: names and shapes of their parameters and some of the numbers.

    The same for both layouts of the parameters, and, as it looks at numbers rounded to bfloat16, for all dtypes.
    """
    layers = "blocks" in params
    stacked = lambda path: layers and path[0].key == "blocks"

    def shape(path, x):
        """As an array, with one row a layer where x is stacked."""
        return np.tile(x.shape[1:], (len(x), 1)) if stacked(path) else np.array(x.shape)

    def sample(path, x):
        own = x.shape[1:] if stacked(path) else x.shape
        places = np.unravel_index(np.linspace(0, np.prod(own, dtype=int) - 1, SAMPLES).astype(int), own)
        found = x[:, *places] if stacked(path) else x[places]
        return np.asarray(found).astype(jnp.bfloat16)

    trees = [jax.tree_util.tree_map_with_path(part, params) for part in (shape, sample)]
    shapes, samples = (unstack(tree) if layers else tree for tree in trees)
    parts = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(samples), strict=True)
    found = sorted((jax.tree_util.keystr(path), size.tolist(), part.tobytes().hex()) for (path, size), part in parts)
    heads = min(model.head_size, model.dim) if "attention" in model.layers else None  # no shape tells it
    return hashlib.sha256(json.dumps([heads, found]).encode()).hexdigest()
