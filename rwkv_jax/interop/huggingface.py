"""Folders for transformers, and the hub that shares them; neither torch nor transformers is needed.

They hold RWKV-4 for its own RwkvForCausalLM, or RWKV-7 for flash-linear-attention's, see `fla`. A folder is
`config.json` beside `model.safetensors` or `pytorch_model.bin`, each perhaps in parts that an index names.

Beware: transformers' `save_pretrained` of RWKV-4, called after a forward pass in evaluation with its default
`rescale_every` of 6, stores weights from layer 6 on divided by 2, 4, ... without recording it, so that neither
transformers nor this module reads back the model that was saved. Loading warns if the sizes of the weights show it.
Folders written here disable rescaling, unless the weights are float16, whose range needs it.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax import files
from rwkv_jax.interop import card, fla, formats, pth, safetensors_file
from rwkv_jax.interop.official import layer_count, version_of, without_prefix
from rwkv_jax.models.block import RELEASED_EPSILON

SHARD_BYTES = 5 * 10**9  # of tensors in one file
# Where `read` looks for weights, and their parts.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PARTS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
# Parts of official names and what transformers calls them; `rwkv.` comes before all but `head.weight`.
_RENAMED = {
    "emb.": "embeddings.",
    ".ln0.": ".pre_ln.",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}
# Fields of config.json as our model has them, which are also the defaults of absent ones.
_CARRIED = {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-5}
_TYPES = {"rwkv": ("RWKV-4", _CARRIED), "rwkv7": ("RWKV-7", fla.CARRIED)}  # by model_type of a config.json


def to_transformers(name: str) -> str:
    """Return transformers' name of an official tensor."""
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name if name == "head.weight" else f"rwkv.{name}"


def to_official_name(name: str) -> str:
    """Return the official name of a tensor of transformers; any other name is kept."""
    if not name.startswith("rwkv."):
        return name
    name = name.removeprefix("rwkv.")
    for theirs, ours in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def named_officially(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Return tensors by official name, from names of transformers or fla too, with or without DeepSpeed's prefix.

    Also returns the epsilon of the heads' norm in the library whose names they had.
    """
    tensors = without_prefix(tensors)
    if fla.are_named_by_fla(tensors):
        tensors = fla.from_fla(tensors)
        return tensors, fla.head_norm_epsilon(tensors) if "blocks.0.att.r_k" in tensors else RELEASED_EPSILON
    return {to_official_name(name): x for name, x in tensors.items()}, RELEASED_EPSILON


def are_named_by_transformers(tensors: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith("rwkv.") for name in tensors)


def read(folder) -> dict[str, np.ndarray]:
    """Return the tensors in a folder by the names that they have there: views of its memory-mapped files.

    Raises:
      ValueError: its model is of another kind, or a variant that ours lacks; a file is damaged or missing.
    """
    folder = Path(folder)
    _check_config(folder / "config.json")
    present = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if present is None:
        raise ValueError(f"{folder}: a config.json without weights; expected one of {', '.join(_WEIGHTS)}")
    tensors = {}
    for path in _parts(present) if present.suffix == ".json" else [present]:
        tensors |= pth.read(path) if formats.format_of(path) == "pth" else safetensors_file.read(path)[0]
    return tensors


def _check_config(path: Path) -> None:
    config = files.read_json(path)
    found = config.get("model_type")
    if not isinstance(found, str) or found not in _TYPES:
        known = " and ".join(f"{name!r} ({version})" for name, (version, _) in _TYPES.items())
        raise ValueError(f"{path}: model_type is {found!r:.99}; only {known} are supported")
    version, carried = _TYPES[found]
    width = {"attention_hidden_size": config.get("hidden_size")}
    for key, value in {**carried, **width}.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{path}: {key} is {config[key]!r:.99}; {version} as released has {value!r:.99}")


def report_rescaling(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Warn on stderr if transformers seems to have divided weights by powers of 2: see the module's docstring.

    The sign is that every `rescale_every` layers both matrices that it divides become half as large, relative to their
    change between the layers around.

    Args:
        path: of the folder, or of the file of one.
        tensors: those of `read`, by official name.
    """
    path, config = Path(path), {}
    with contextlib.suppress(OSError, ValueError):  # beside a file it may be anything, or missing
        config = files.read_json((path if path.is_dir() else path.parent) / "config.json")
    every = config.get("rescale_every", 6)  # transformers' default
    first = range(every, layer_count(tensors), every) if isinstance(every, int) and every > 2 else ()
    if not first or config.get("model_type", "rwkv") != "rwkv":
        return
    sizes = {name: _log2_sizes(tensors, name) for name in ("att.output", "ffn.value")}
    if all(_halves(size_L, layer) for size_L in sizes.values() for layer in first):
        print(
            f"{path}: {' and '.join(sizes)} look divided by 2 from layer {every} on, 4 from {2 * every} on, ..., "
            "as transformers saves them after a forward pass: save before one, or with rescale_every = 0",
            file=sys.stderr,
        )


def _log2_sizes(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return log2 of the root mean square of some rows of a matrix in each layer, [L]."""
    matrices = (tensors[f"blocks.{i}.{name}.weight"] for i in range(layer_count(tensors)))
    rows = (x[:: max(1, len(x) // 64)].astype(np.float64) for x in matrices)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2([np.sqrt(np.mean(x * x)) for x in rows])


def _halves(size_L: np.ndarray, layer: int) -> bool:
    """Return whether log2 of a size falls by about 1 at a layer, relative to the layers before and after."""
    with np.errstate(invalid="ignore"):
        change = np.diff(size_L)  # [i]: from layer i to i + 1
        around = np.delete(change[layer - 2 : layer + 1], 1)
        return bool(abs(change[layer - 1] - around.mean() + 1) < 0.5)


def _parts(index: Path) -> list[Path]:
    parts = files.read_json(index).get("weight_map")
    names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
    if not names or any(not re.fullmatch(r"[\w-][\w.-]*", name) for name in names):
        raise ValueError(f"{index}: its weight_map does not name files of the folder: {names!r:.99}")
    for name in names:
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent}: {name}, one of its {len(names)} parts, is missing")
    return [index.parent / name for name in names]


def write(
    folder,
    tensors: Mapping[str, np.ndarray],
    epsilon: float = RELEASED_EPSILON,
    readme: bytes | None = None,
    tokenizer: Any = None,
) -> None:
    """Write official tensors of RWKV-4 or 7 as a folder that `from_pretrained` loads, whole or not at all.

    An earlier folder of this kind is replaced, but its other files are kept, a tokenizer too if `tokenizer` is None.

    Args:
      epsilon: of the heads' norm of their model.
      readme: its model card, see `card`.
      tokenizer: a `data.tokenizers.Tokenizer`, saved beside the weights.

    Raises:
      FileExistsError: something else is there.
      FileNotFoundError: its parent folder does not exist.
      ValueError: the model would be computed with another epsilon.
    """
    folder = Path(folder).absolute()
    check_folder(folder)
    of_fla = version_of(tensors) == "rwkv7"
    its = fla.head_norm_epsilon(tensors) if of_fla else RELEASED_EPSILON
    if epsilon != its:
        raise ValueError(
            f"{folder}: transformers would compute this model with head_norm_epsilon={its}, "
            f"and it has {epsilon}; use .safetensors"
        )
    config = fla.config(tensors) if of_fla else _config(tensors)
    tensors = fla.to_fla(tensors) if of_fla else {to_transformers(name): x for name, x in tensors.items()}
    replaced = ["config.json", *_WEIGHTS, *_PARTS]
    if tokenizer is not None:
        from rwkv_jax.data import tokenizers  # here, because it imports a library that loading does not need

        replaced += tokenizers.FILES
    with files.written_folder(folder) as new:
        if folder.is_dir():
            ignore = shutil.ignore_patterns(*replaced)
            shutil.copytree(folder, new, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        from huggingface_hub import split_state_dict_into_shards_factory  # here, because it imports an HTTP client

        parts = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda x: x.size * x.dtype.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        for file, names in parts.filename_to_tensors.items():
            part = {name: tensors[name] for name in names}
            safetensors_file.write(new / file, part, {"format": "pt"})  # required by transformers 4
        if parts.is_sharded:
            index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if readme is not None:
            card.write(new, folder, readme)
        if tokenizer is not None:
            tokenizers.save(tokenizer, new)


def check_folder(folder: Path) -> None:
    """Raise OSError unless `write` can create this folder, or write to it: it is empty or of an RWKV model."""
    real = Path(os.path.realpath(folder))
    if os.path.ismount(real) or real == Path.cwd():
        what = "a mount point" if os.path.ismount(real) else "the current folder"
        raise FileExistsError(f"{folder} is {what}, which cannot be replaced; name a folder inside it")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no such folder; cannot write {folder.name} there")
    files.check_output_folder(folder.parent)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        known = files.read_json(folder / "config.json").get("model_type") in list(_TYPES)
    except (ValueError, OSError):
        known = False
    if not known:
        raise FileExistsError(f"{folder}: exists and is not a folder of an RWKV model; choose another name")


def _config(tensors: Mapping[str, np.ndarray]) -> dict:
    V, D = tensors["emb.weight"].shape
    dtype = tensors["head.weight"].dtype.name
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": V,
        "hidden_size": D,
        "attention_hidden_size": D,
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        "num_hidden_layers": layer_count(tensors),
        "context_length": 1024,  # what transformers' CUDA kernel is compiled for; the model has no such limit
        "rescale_every": 6 if dtype == "float16" else 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": dtype,
        **_CARRIED,
    }
