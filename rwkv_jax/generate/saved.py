"""Contexts as safetensors files, with their text and the fingerprint of their model; released tuned states."""

import json
from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import files
from rwkv_jax.generate.context import CACHE_STEP, Context, cache_axes, check
from rwkv_jax.generate.decode import after_separator
from rwkv_jax.interop import fingerprint, formats, pth, safetensors_file, states

FORMAT = "rwkv_jax context 1"


def save_context(path, context: Context, model, params, text: str | None = None) -> None:
    """Write a context of this model, and its text if given, to `path`, whole or not at all."""
    path = files.user_path(path)
    check(model, context, len(context.logits_BV))
    chosen = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in ("parent", "name")}
    metadata = {"format": FORMAT, "fingerprint": fingerprint(model, params), "model": json.dumps(chosen)}
    if text is not None:
        metadata["text"] = text
    safetensors_file.write(path, _named(context), metadata)


def load_context(path, model, params) -> tuple[Context, str | None]:
    """Return the context at `path` and its text, None where it was saved without one.

    A .pth with `time_state` tensors, alone or beside the weights, is a tuned state as released: its context is that
    after the separator. Such a file does not identify its model, only its sizes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a context, is damaged, or belongs to another model.
    """
    path = files.user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a saved context")
    with path.open("rb") as file:
        is_released = file.read(len(formats.PTH)) == formats.PTH
    if is_released:
        tensors = pth.read(path)
        with formats.naming(path):
            return after_separator(model, params, states.from_time_state(model, tensors)), None
    arrays, metadata = safetensors_file.read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved context, or one of another version: expected {FORMAT!r}")
    if metadata.get("fingerprint") != fingerprint(model, params):
        raise ValueError(f"{path} is the context of another model: {metadata.get('model')}")
    return _context(path, model, arrays), metadata.get("text")


def _context(path, model, arrays) -> Context:
    """Build a context of this model, in its dtypes, from named arrays; their caches may have any length."""
    B = len(arrays.get("logits_BV", ()))
    wanted = jax.eval_shape(lambda: model.init_state(B, max_length=CACHE_STEP))
    wanted = Context(wanted, jax.ShapeDtypeStruct((B, model.vocab_size), jnp.promote_types(model.dtype, jnp.float32)))
    shapes = _named(wanted)
    if B == 0 or arrays.keys() != shapes.keys():
        raise ValueError(f"{path} is damaged: its arrays are not those of a context")
    for name, shape in shapes.items():
        if jnp.issubdtype(arrays[name].dtype, jnp.floating) != jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"{path} is damaged: {name} is {arrays[name].dtype}, expected {shape.dtype}")
    with formats.naming(path):
        copies = {name: formats.copied(name, x, np.empty(x.shape, shapes[name].dtype)) for name, x in arrays.items()}
    leaves = [jnp.array(copies[name]) for name in shapes]
    context = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    try:
        check(model, context, B)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    leaves = zip(jax.tree.leaves(context.state), cache_axes(model), strict=True)
    slots = {x.shape[axis] for x, grows in leaves for axis in grows}
    entries = zip(model.every_layer, context.state, strict=True)
    counts = np.array([kind.cached(entry) for (_, kind, _), entry in entries if kind.cached])
    if len(slots) > 1 or (counts < 0).any() or (counts > max(slots, default=0)).any():
        raise ValueError(f"{path} is damaged: its caches are not those of one text")
    return context


def _named(context: Context) -> dict:
    """Return the leaves by their path, such as "state.3.cache.k_BHSK"."""
    join = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(context)}
