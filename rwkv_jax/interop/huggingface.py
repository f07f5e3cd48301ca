"""Folders of transformers' RwkvForCausalLM and the hub that shares them; neither torch nor transformers is needed.

A folder is `config.json` beside `model.safetensors` or `pytorch_model.bin`, each perhaps in parts that an index
names. Beware: transformers' `save_pretrained`, called after a forward pass in evaluation with its default
`rescale_every` of 6, stores weights from layer 6 on divided by 2, 4, ... and says so nowhere, so that neither
transformers nor this module reads back the model that was saved. Folders written here ask for no rescaling, unless
the weights are float16, whose range needs it.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rwkv_jax import files
from rwkv_jax.interop import formats, pth, safetensors_file
from rwkv_jax.interop.official import layer_count, without_prefix

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
_CARRIED = {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-5}  # by our model; also what is not written


def to_transformers(name: str) -> str:
    """transformers' name of an official tensor."""
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name if name == "head.weight" else f"rwkv.{name}"


def to_official_name(name: str) -> str:
    """The official name of a tensor of transformers; any other name stays as it is."""
    if not name.startswith("rwkv."):
        return name
    name = name.removeprefix("rwkv.")
    for theirs, ours in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def named_officially(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by official name, which may come by transformers' names or with DeepSpeed's prefix."""
    return {to_official_name(name): x for name, x in without_prefix(tensors).items()}


def read(folder) -> dict[str, np.ndarray]:
    """The tensors in a folder by official name: views of its memory-mapped files.

    Raises:
      ValueError: it is of another kind or of a variant that our model cannot carry, a file is damaged or missing.
    """
    folder = Path(folder)
    _check_config(folder / "config.json")
    present = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if present is None:
        raise ValueError(f"{folder}: a config.json without weights; expected one of {', '.join(_WEIGHTS)}")
    tensors = {}
    for path in _parts(present) if present.suffix == ".json" else [present]:
        tensors |= pth.read(path) if formats.format_of(path) == "pth" else safetensors_file.read(path)[0]
    return named_officially(tensors)


def _check_config(path: Path) -> None:
    config = files.read_json(path)
    if config.get("model_type") != "rwkv":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; only 'rwkv' (RWKV-4) is supported")
    width = config.get("hidden_size")
    for key, carried in {**_CARRIED, "attention_hidden_size": width}.items():
        if config.get(key) not in (None, carried):
            raise ValueError(f"{path}: {key} is {config[key]!r:.99}; RWKV-4 as released has {carried!r:.99}")


def _parts(index: Path) -> list[Path]:
    parts = files.read_json(index).get("weight_map")
    names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
    if not names or any(not re.fullmatch(r"[\w-][\w.-]*", name) for name in names):
        raise ValueError(f"{index}: its weight_map does not name files of the folder: {names!r:.99}")
    for name in names:
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent}: {name}, one of its {len(names)} parts, is missing")
    return [index.parent / name for name in names]


def write(folder, tensors: Mapping[str, np.ndarray]) -> None:
    """Write official RWKV-4 tensors as a folder that `RwkvForCausalLM.from_pretrained` loads, whole or not at all.

    Over an earlier folder of this kind, whose other files (a tokenizer) are kept.

    Raises:
      FileExistsError: something else is there.
      FileNotFoundError: the folder in which it goes does not exist.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    with files.written_folder(folder) as new:
        if folder.is_dir():
            weights = shutil.ignore_patterns("config.json", *_WEIGHTS, *_PARTS)
            shutil.copytree(folder, new, symlinks=True, ignore=weights, dirs_exist_ok=True)
        (new / "config.json").write_text(json.dumps(_config(tensors), indent=2) + "\n")
        tensors = {to_transformers(name): x for name, x in tensors.items()}
        from huggingface_hub import split_state_dict_into_shards_factory  # here, because it imports an HTTP client

        parts = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda x: x.size * x.dtype.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        for file, names in parts.filename_to_tensors.items():
            part = {name: tensors[name] for name in names}
            safetensors_file.write(new / file, part, {"format": "pt"})  # which transformers 4 insists on
        if parts.is_sharded:
            index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _refuse_foreign(folder: Path) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        known = files.read_json(folder / "config.json").get("model_type") == "rwkv"
    except (ValueError, OSError):
        known = False
    if not known:
        raise FileExistsError(f"{folder}: exists and is no folder of an RWKV model; choose another name")


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
