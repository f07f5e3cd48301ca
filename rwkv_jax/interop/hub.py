"""Names on the Hugging Face hub -> local files, by huggingface_hub's own cache and settings (HF_HOME, HF_TOKEN)."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from rwkv_jax import files
from rwkv_jax.data import hub

_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[\w-][\w./-]*\.(?:pth|safetensors|bin)))?")
_BESIDE = ["*.json", "*.txt"]  # config, index and tokenizer files


def is_name(name: str) -> bool:
    """Return whether `name` can be "org/name" or "org/name/path/of/a.pth"; its first part must not exist locally."""
    found = _NAME.fullmatch(name)
    if found is None or Path(name.split("/")[0]).exists():
        return False
    return found["file"] is not None or not name.endswith((".pth", ".safetensors", ".bin"))


def download(name: str) -> Path:
    """Return the folder of a repository, or one file of it, from the cache or the hub.

    Only the weights that `huggingface.read` takes, and small files beside them, are downloaded for a folder.

    Raises:
      FileNotFoundError: there is no such repository or file.
      PermissionError: it is private or gated.
      OSError: it cannot be reached, or the download failed.
    """
    repo, file = _NAME.fullmatch(name).group("repo", "file")
    from_cache = {"local_files_only": not hub.is_reached()}
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, **from_cache))
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[*_BESIDE, weights], **from_cache))
            if any(folder.glob(weights)):
                return folder
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name}: gated on the hub; accept its terms there, then log in: hf auth login"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(f"{name}: no such file here, not in the hub's cache, and the hub was not reached") from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(f"{name}: no such file here, and none on the hub that you may read") from error
    except Exception as error:  # of whatever HTTP library is underneath
        raise OSError(f"{name}: no such file here, and the hub failed: {files.one_line(error)}") from error
    raise FileNotFoundError(
        f"{name}: the hub has it without model.safetensors and pytorch_model.bin; name a file: {name}/FILE.pth"
    )
