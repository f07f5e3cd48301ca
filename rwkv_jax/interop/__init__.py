"""Files and folders that hold a model <-> (model, params)."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from rwkv_jax.interop import pth, states
from rwkv_jax.interop.official import (
    activation_dtype,
    check,
    float_dtype,
    from_official,
    parameter_shapes,
    place,
    sharding_tree,
    to_official,
)
from rwkv_jax.models import build, stack, unstack

__all__ = ["from_official", "load", "save", "states", "to_official"]


def load(path, dtype: str | None = None, sharding: Any = None, scan: bool = True) -> tuple[nn.Module, Any]:
    """Model and parameters from whatever `path` is, which its content tells: an official RWKV-4 `.pth`, or a
    training workdir (`config.json` beside `checkpoints/`; its newest valid checkpoint).

    Args:
      dtype: of parameters and activations; None keeps what the file or the run has. See `from_official`.
      sharding: None for the default device, one `jax.sharding.Sharding`, or a tree of them like the parameters.
      scan: layers stacked [L, ...], or one set of parameters a layer (which decodes faster).

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: what is there is damaged or no model that this reads, in one line that says why.
    """
    path = Path(path)
    if path.is_dir():
        return _load_workdir(path, dtype, sharding, scan)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a .pth or a training workdir")
    tensors = pth.read(path)
    try:
        return from_official(tensors, dtype, sharding, scan)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(path, model: nn.Module, params: Any, format: str | None = None) -> None:
    """Write model and parameters to `path`, whole or not at all.

    Args:
      format: "pth", the official state dict, so far the only one; None takes it from the suffix of `path`.

    Raises:
      ValueError: the format is not supported, cannot hold this model, or `params` are not this model's.
    """
    path = Path(path)
    if (format or path.suffix).removeprefix(".") != "pth":
        raise ValueError(f"{path}: cannot write format {format or path.suffix!r}; expected .pth")
    others = [kind for kind in model.layers if kind != "rwkv4"]
    if others:
        raise ValueError(f"{path}: a .pth holds RWKV-4 layers only, and this model has {others[0]!r} layers")
    tensors = to_official(params)
    try:
        check(tensors, parameter_shapes(model))
    except ValueError as error:
        raise ValueError(f"{path}: params are not those of this model: {error}") from error
    pth.write(path, tensors)


def _load_workdir(path: Path, dtype, sharding, scan) -> tuple[nn.Module, Any]:
    from rwkv_jax import checkpoint  # here, because Orbax takes seconds to import and a .pth does without

    name, fields = _read_config(path / "config.json")
    model = build(name, **fields)
    _, params = checkpoint.restore(path / "checkpoints", parameter_shapes(model), key="params")
    if scan != model.scan:
        params = stack(params, len(model.layers)) if scan else unstack(params)
    if dtype is not None:
        dtype = float_dtype(dtype)
        fields |= {"dtype": activation_dtype(dtype), "param_dtype": dtype}
    model = build(name, **fields | {"scan": scan})
    shapes = parameter_shapes(model)

    def put(x, leaf, sharding):
        return place(lambda index: np.asarray(x)[index].astype(leaf.dtype), leaf.shape, sharding)

    return model, jax.tree.map(put, params, shapes, sharding_tree(sharding, shapes))


def _read_config(path: Path) -> tuple[str, dict]:
    """Name and fields of the model in a training workdir's config.json."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: a folder without config.json; expected a .pth or a training workdir")
    try:
        fields = dict(json.loads(path.read_bytes())["model"])
        return fields.pop("name"), fields
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"model": {{"name": ..., fields}}}}: {error!r}') from error
