"""Datasets of the Hugging Face hub, streamed: `hf:NAME[@REVISION][:SPLIT]` or `hf:NAME[@REVISION]:CONFIG:SPLIT`.

NAME is what `datasets.load_dataset` takes, a folder too. Only the tokens are kept. Without SPLIT the dataset's train,
validation and test are ours; what is missing is taken from train, as of one split, see `splitter`. Text and prompt are
fields or templates, as of JSONL. Without a revision a dataset that changes on the hub is not noticed.
"""

from collections.abc import Iterator

from rwkv_jax.corpora import jsonl
from rwkv_jax.corpora.corpus import Document, Source, splitter
from rwkv_jax.files import user_path

PREFIX = "hf:"


def source(spec: str, text: str, prompt: str) -> Source:
    """
    Raises:
        ValueError: no such form, or the package `datasets` is missing.
    """
    name, *rest = spec.removeprefix(PREFIX).split(":")
    name, _, revision = name.partition("@")
    if not name or len(rest) > 2 or not all(rest):
        raise ValueError(f"corpus is {spec!r}, expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    make = jsonl.maker(text, prompt)
    identity = [spec, text, prompt]
    if (path := user_path(name)).is_dir():
        name, title = str(path), path.resolve().name
        files = sorted(file for file in path.rglob("*") if file.is_file())
        identity += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        title = name.replace("/", "-")
    config, split = [None, None, *rest][-2:]
    load = lambda: _load(spec, name, config, split, revision or None)
    return Source(title, identity, None, lambda: _documents(spec, load(), make), bool(prompt))


def _load(spec: str, name: str, config: str | None, split: str | None, revision: str | None) -> dict:
    """Name of each split -> its records."""
    try:
        import datasets  # optional: it brings pandas and pyarrow
    except ImportError:
        raise ValueError(f"corpus {spec} needs another package: pip install datasets") from None
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except OSError as error:
        raise OSError(f"corpus {spec}: {error}") from None
    except Exception as error:  # the library raises what its parsers raise
        raise ValueError(f"corpus {spec}: {error}") from None
    return {"train": found} if split else found


def _documents(spec: str, found: dict, make) -> Iterator[Document]:
    given = {name: jsonl.named_split(name) for name in found}
    split_of = splitter([split for split in (1, 2) if split not in given.values()])
    for name, records in found.items():
        for number, record in enumerate(records):
            try:
                prompt, text = make(record)
            except ValueError as error:
                raise ValueError(f"corpus {spec}, row {number} of {name}: {error}") from None
            if text:
                yield Document(given[name] or split_of(prompt + text), [text], prompt)
