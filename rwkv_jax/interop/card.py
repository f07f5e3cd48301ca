"""The model card of a folder: a README.md with what is known of the model, and how to load it.

Its front matter is what the Hugging Face hub reads. The last line holds the SHA-256 of all before it: a README.md
without it, or changed since, is somebody's own text and is never replaced.
"""

import contextlib
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rwkv_jax
from rwkv_jax import files

NAME = "README.md"
# What a card may know of a training run: see `runs.load_with_training`.
FIELDS = {
    "corpus": str,
    "corpus_sha256": str,
    "steps": int,
    "tokens": int,
    "loss_nats": float,
    "valid_loss_nats": float,
    "started_from": str,
    "versions": dict,
    "config": dict,
}
LICENSE = "Apache-2.0"  # of the code; nobody has said which one the weights have
_LAST = re.compile(rb"<!-- model card of rwkv_jax, SHA-256 of the lines above: ([0-9a-f]{64}) -->\n\Z")
_TRAINING = re.compile(rb"\n```json\n(.*)\n```\n", re.DOTALL)
_FOLDERS = re.compile(r"(?<![^,\s])(?:~|\.{1,2})?/(?:[^,:/]+/)*")  # of paths that begin with /, ~, . or ..
_UNKNOWN = "unknown"


def known(training: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a training run that have the type of their field."""
    fits = lambda x, kind: type(x) is kind or (kind is float and type(x) is int)
    found = {name: training[name] for name, kind in FIELDS.items() if fits(training.get(name), kind)}
    return {name: x for name, x in found.items() if not isinstance(x, float) or math.isfinite(x)}


def public(value: Any) -> Any:
    """A JSON value without folders of this machine and without the fields of loggers."""
    if isinstance(value, dict):
        return {name: public(x) for name, x in value.items() if name != "logging"}
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def read(folder: Path) -> dict[str, Any] | None:
    """The facts of training in the unchanged card of a folder; None where it has none."""
    with contextlib.suppress(ValueError, OSError):  # anybody can compute a SHA-256; a card may be unreadable
        content = _own(folder / NAME)
        found = content and _TRAINING.search(content)
        return known(files.parse_json(found[1])) if found else None
    return None


def write(folder: Path, shown: Path, text: bytes) -> None:
    """Write a card into a folder that is called `shown`, unless somebody else's README.md is there."""
    path = folder / NAME
    if os.path.lexists(path):
        if _own(path) is None:
            print(f"{shown / NAME} is not as rwkv_jax wrote it, so it stays: no model card written", file=sys.stderr)
            return
        path.unlink()
    path.write_bytes(text)


def _own(path: Path) -> bytes | None:
    """The lines of a card above the last one; None where the file is no card, or was changed."""
    content = path.read_bytes() if path.is_file() else b""
    last = _LAST.search(content)
    above = content[: last.start()] if last else b""
    return above if last and hashlib.sha256(above).hexdigest() == last[1].decode() else None


def text(name: str, model, params_by_name: Mapping[str, Any], training: Mapping | None, tokenizer=None) -> bytes:
    """The card of a model of one kind of layer.

    Args:
        name: of the folder.
        params_by_name: its arrays.
        training: facts as from `known`; None: unknown.
        tokenizer: a `data.tokenizers.Tokenizer`, or None.
    """
    training = public(known(training or {}))
    kind, released = model.layers[0], model.unit[0][1].released
    arrays = params_by_name.values()
    dtypes = ", ".join(sorted({x.dtype.name for x in arrays}))
    sizes = f"{model.num_layers} layers of width {model.dim:,}, vocabulary of {model.vocab_size:,}"
    rows = {
        "model": f"{released or kind}, {sizes}",
        "parameters": f"{sum(x.size for x in arrays):,}, {dtypes}",
        "tokenizer": f"{Path(tokenizer.name).name}, {tokenizer.vocab_size:,} tokens" if tokenizer else _UNKNOWN,
        "training data": _corpus(training),
        "tokens seen": f"{training['tokens']:,}" if "tokens" in training else _UNKNOWN,
        "steps": f"{training['steps']:,}" if "steps" in training else _UNKNOWN,
        "last loss": _nats(training, "loss_nats"),
        "last held-out loss": _nats(training, "valid_loss_nats"),
        "started from": training.get("started_from", "random weights" if training.get("config") else _UNKNOWN),
        "trained with": _versions(training.get("versions", {})) or _UNKNOWN,
        "written by": _versions(
            {"rwkv_jax": rwkv_jax.__version__, "python": platform.python_version()} | _installed()
        ),
        "licence": f"of the weights: unknown; of rwkv_jax, the code: {LICENSE}",
    }
    cell = lambda x: " ".join(str(x).split()).replace("|", "\\|")
    lines = [
        *("---", "license: unknown", "library_name: rwkv_jax", "pipeline_tag: text-generation"),
        *("tags:", "- rwkv", f"- {kind}", "- jax", "---", ""),
        *(f"# {cell(name)}", "", "| | |", "| --- | --- |"),
        *(f"| {row} | {cell(value)} |" for row, value in rows.items()),
        *("", "```python", "import rwkv_jax", ""),
        'lm = rwkv_jax.RWKVForCausalLM.from_pretrained("PATH")  # of this folder, or its name on the hub',
        *('print(lm.generate("Once", max_new_tokens=100))', "```", ""),
    ]
    if training:
        lines += ["The training run, with its config:", "", "```json", files.to_json(training, indent=1), "```", ""]
    above = "\n".join([*lines, ""]).encode(errors="replace")
    last = f"<!-- model card of rwkv_jax, SHA-256 of the lines above: {hashlib.sha256(above).hexdigest()} -->\n"
    return above + last.encode()


def _corpus(training: Mapping) -> str:
    digest = f", SHA-256 {training['corpus_sha256']}" if "corpus_sha256" in training else ""
    return training["corpus"] + digest if "corpus" in training else _UNKNOWN


def _nats(training: Mapping, name: str) -> str:
    return f"{training[name]:.4f} nats a token" if name in training else _UNKNOWN


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _installed() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
