"""Datasets of the Hugging Face hub, streamed: `hf:NAME[@REVISION][:SPLIT]` or `hf:NAME[@REVISION]:CONFIG:SPLIT`.

NAME is an argument of `datasets.load_dataset`, a folder too. Only the tokens are kept. Without SPLIT the dataset's
train, validation and test are the three splits; `splitter` takes missing ones from train. Text and prompt
are fields or templates, as for JSONL. Name a revision where the dataset may change: the cache does not notice it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.data import contents, jsonl
from rwkv_jax.data.corpus import Source
from rwkv_jax.files import user_path

PREFIX = "hf:"
_SECONDS = 5  # without an answer, after which the hub counts as unreachable


def source(spec: str, text: str, prompt: str) -> Source:
    """Return the source of a dataset, which is opened when its documents are read.

    Raises:
        ValueError: the spec has another form.
    """
    name, *rest = spec.removeprefix(PREFIX).split(":")
    folder, rest = _folder(name, rest)
    name, _, revision = (name, "", "") if folder else name.partition("@")
    if not name or len(rest) > 2 or not all(rest):
        raise ValueError(f"corpus is {spec!r}, expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    make = jsonl.maker(text, prompt)
    identity = [spec, text, prompt]
    if folder and re.search(r"[*?\[\]]", str(folder.resolve())):
        raise ValueError(f"corpus {spec}: *, ?, [ and ] in a folder's name are a pattern to the library: rename it")
    if folder:
        title = contents.absolute(folder).name
        entries = sorted(file for file in folder.rglob("*") if file.is_file())
        identity += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in entries]
    else:
        title = name.replace("/", "-")
    config, split = [None, None, *rest][-2:]
    tally = Counter()

    def documents():
        parts = _load(spec, str(folder or name), config, split, revision or None)
        return jsonl.documents(((part, _records(spec, part, rows)) for part, rows in parts.items()), make, tally)

    return Source(title, identity, None, documents, tally, bool(prompt))


def _folder(name: str, rest: list[str]) -> tuple[Path | None, list[str]]:
    """Return the local folder that a spec names, if any, and the rest; the name may hold colons and @."""
    for end in range(len(rest) + 1 if name else 0):
        if (path := user_path(":".join([name, *rest[:end]]))).is_dir():
            return path, rest[end:]
    return None, rest


def is_reached() -> bool:
    """Return whether the hub answers; without a network its libraries retry for minutes."""
    from huggingface_hub import constants  # here, because it imports an HTTP client
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of whatever HTTP library is underneath
        return False
    return True


def _load(spec: str, name: str, config: str | None, split: str | None, revision: str | None) -> dict:
    """Return the rows of each split by its name."""
    try:
        import datasets  # optional: it brings pandas and pyarrow
    except ImportError:
        raise ValueError(f"corpus {spec} needs another package: pip install datasets") from None
    if not Path(name).is_dir() and not is_reached():
        raise OSError(f"corpus {spec}: the hub was not reached")
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except OSError as error:
        raise OSError(f"corpus {spec}: {error}") from None
    except Exception as error:  # the library raises what its parsers raise
        raise ValueError(f"corpus {spec}: {error}") from None
    return {"train": found} if split else found


def _records(spec: str, part: str, rows) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(rows):
        yield f"corpus {spec}, row {number} of {part}", row
