"""Files and folders that hold a model <-> (model, params).

Each format is a reader and a writer of tensors by name; `official` translates names and tensors to parameters.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from rwkv_jax import files
from rwkv_jax.interop import card, formats, huggingface, pth, rwkv_cpp, safetensors_file, states
from rwkv_jax.interop.fingerprint import fingerprint
from rwkv_jax.interop.official import check, from_official, model_of, to_official, version_of
from rwkv_jax.models.block import RELEASED_EPSILON

__all__ = [
    "check_format", "describe", "destination", "fingerprint", "from_official", "load", "locate", "save", "states",
    "to_official",
]  # fmt: skip

FORMATS = ("pth", "safetensors", "huggingface", "rwkv.cpp")
_FIELDS = "rwkv_jax"  # metadata key of the model's fields in a .safetensors of ours


def load(path, dtype: str | None = None, sharding: Any = None, scan: bool = True) -> tuple[nn.Module, Any]:
    """Return model and parameters from a file or folder, whose format is detected from its content.

    That is an official `.pth` of RWKV-4, 5.2, 6 or 7; a `.safetensors` with official or transformers' names, or one of
    ours, with any model; a folder for transformers, of its RwkvForCausalLM (RWKV-4) or flash-linear-attention's
    RWKV7ForCausalLM; or an rwkv.cpp file of any of these versions, FP32 or FP16. `rwkv_jax.load` takes a training
    workdir too. The model computes what the file's own runtime does: RWKV-5.2 in files of rwkv.cpp has another
    `head_norm_epsilon` than the released one.

    Args:
      path: of a file or folder, or a name on the Hugging Face hub: see `locate`.
      dtype: of parameters and activations; None keeps what the file has. See `from_official`.
      sharding: None for the default device, one `jax.sharding.Sharding`, or a tree of them like the parameters.
        Arrays are built from the memory-mapped file straight onto their devices: a host reads only its shards.
      scan: layers stacked [L, ...], or one set of parameters a layer (which decodes faster).

    Raises:
      OSError: nothing is at `path`, or it cannot be read or downloaded.
      ValueError: it is damaged, or has none of these formats.
    """
    path = locate(path)
    found, fields, tensors, epsilon = _read(path)
    with formats.naming(path):
        loaded = from_official(tensors, dtype, sharding, scan, fields, epsilon)
    if path.is_dir() or huggingface.are_named_by_transformers(found):
        huggingface.report_rescaling(path, tensors)
    if any(map(_is_tuned_state, found)):
        print(f"{path} holds tuned initial states, ignored here: load it as a context, too", file=sys.stderr)
    return loaded


def _is_tuned_state(name: str) -> bool:
    return name.endswith(states.TIME_STATE)


def describe(path) -> nn.Module:
    """Return the model that `load` would return for `path`, without reading its parameters; the same errors."""
    path = locate(path)
    _, fields, tensors, epsilon = _read(path)
    with formats.naming(path):
        return model_of(tensors, fields=fields, head_norm_epsilon=epsilon)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None, dict[str, np.ndarray], float]:
    """Return (tensors by their own names, fields, tensors by official name, epsilon of the heads' norm) of a path.

    The fields are the model's if the file is one of ours, else None; the epsilon is that of the file's runtime.
    """
    fields = None
    if path.is_dir():
        tensors = huggingface.read(path)
    elif (kind := formats.format_of(path)) == "safetensors":
        tensors, metadata = safetensors_file.read(path)
        if _FIELDS in metadata:
            with formats.naming(f"{path}: its metadata {_FIELDS!r}"):
                fields = files.parse_json(metadata[_FIELDS])
    elif kind == "rwkv.cpp":
        tensors = rwkv_cpp.read(path)
        return tensors, fields, tensors, rwkv_cpp.head_norm_epsilon(tensors)
    else:
        tensors = pth.read(path)
    if tensors and all(map(_is_tuned_state, tensors)):
        raise ValueError(f"{path}: tuned initial states, not weights; load it as a context of their model")
    return tensors, fields, *huggingface.named_officially(tensors)


def locate(path) -> Path:
    """Return the local file or folder of `path`, downloaded if it is a name on the Hugging Face hub.

    Without a local file, "org/name" (a folder for transformers) and "org/name/file.pth" are such names; the files go
    into the hub's own cache.

    Raises:
      FileNotFoundError: there is none.
      OSError: the hub cannot be reached, or does not give it.
    """
    if (local := files.user_path(path)).exists():
        return local
    from rwkv_jax.interop import hub  # here, because it imports an HTTP client

    if hub.is_name(str(path)):
        return hub.download(str(path))
    raise FileNotFoundError(f"{path}: no such file or folder; expected weights, a training workdir or a hub name")


def destination(path, format: str | None = None) -> tuple[Path, str]:
    """Return the path and format that `save` would use for these arguments; raise its errors before the work."""
    path = files.user_path(path)
    format = format or {"": "huggingface"}.get(path.suffix, path.suffix.removeprefix("."))
    if format not in FORMATS:
        raise ValueError(
            f"{path}: cannot write format {format!r}; expected .pth, .safetensors, no suffix for a folder, or format="
            f"{' | '.join(FORMATS)}"
        )
    if format == "huggingface":
        huggingface.check_folder(path)
    else:
        files.check_output(path)
    return path, format


def save(
    path, model: nn.Module, params: Any, format: str | None = None, *, training: Any = None, tokenizer: Any = None
) -> None:
    """Write model and parameters to `path`, whole or not at all.

    Args:
      format: "pth", the official state dict; "safetensors", the same tensors and the model's fields, for any model;
        "huggingface", a folder for transformers, of RWKV-4 or 7; "rwkv.cpp", float16 if the parameters are, else
        float32. None takes it from the suffix of `path`: .pth, .safetensors, or none for a folder.
      training: for the model card of a folder, what `runs.load_with_training` knows of it; None: unknown.
      tokenizer: for a folder, the model's `data.tokenizers.Tokenizer`, saved beside the weights; None: without one.

    Raises:
      ValueError: the format is not supported, cannot hold this model, or `params` are not this model's.
      OSError: `path` cannot be written, or is a folder of something else.
    """
    path, format = destination(path, format)
    check_format(path, format, model)
    tensors = to_official(params)
    with formats.naming(f"{path}: params are not those of this model"):
        check(tensors, model)
    if format != "safetensors":  # without fields, names and shapes determine the version
        with formats.naming(path):
            version_of(tensors)
    if format == "safetensors":
        safetensors_file.write(path, tensors, {"format": "pt", _FIELDS: json.dumps(_fields(model))})
    elif format == "pth":
        pth.write(path, tensors)
    elif format == "rwkv.cpp":
        rwkv_cpp.write(path, tensors, model.head_norm_epsilon)
    else:
        readme = card.text(path.absolute().name, model, tensors, training, tokenizer)
        huggingface.write(path, tensors, model.head_norm_epsilon, readme, tokenizer)


def check_format(path, format: str, model: nn.Module) -> None:
    """Raise ValueError if `format` cannot hold this model; no parameters are needed."""
    if format != "safetensors" and (differs := _unreleased(model, format)):
        raise ValueError(f"{path}: {format} holds released models only, and this one has {differs}; use .safetensors")


def _unreleased(model: nn.Module, format: str) -> str | None:
    """Return the first difference of a model from the released ones that a format can hold; None without one."""
    others = [f"{name!r} layers" for name, kind, _ in model.unit if format not in kind.formats]
    others += ["layers of several kinds"] if len({name for name, _, _ in model.unit}) > 1 else []
    switches = dict(model.variant) | ({} if model.embedding_norm else {"embedding_norm": False})
    if format == "pth" and model.head_norm_epsilon != RELEASED_EPSILON:  # the other formats check it in `write`
        switches["head_norm_epsilon"] = model.head_norm_epsilon
    return next(iter([*others, *(f"{name}={value!r}" for name, value in switches.items())]), None)


def _fields(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `build` that rebuild the model, apart from the layout of its parameters."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name", "scan")]
    return {name: getattr(model, name) for name in names}
