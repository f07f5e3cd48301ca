"""JSONL: one object a line, whose text is in a field or made by a template.

`text` and `prompt` each name a field or, where they hold braces, are templates of fields:

    text="text"
    prompt="Question: {question}\\n\\nAnswer:", text=" {answer}"

The prompt precedes the text and is no target. The two are tokenized separately, so no token spans both. Objects
whose text is empty are left out.
"""

import gzip
import re
import string
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rwkv_jax.data.corpus import Document, Source, splitter
from rwkv_jax.files import parse_json

SUFFIXES = (".jsonl", ".jsonl.gz")
_SPLIT_NAME = re.compile(r"(train)|(valid|validation|val|dev)|(test)")


def source(path: Path, text: str, prompt: str) -> Source:
    """Source for a file or a folder of files.

    Files whose names begin with train, valid (or validation, val, dev) and test are these splits. `splitter` takes
    the splits that are missing from the rest.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if is_jsonl(file))
    stats = [file.stat() for file in files]
    identity = [str(file) for file in files] + [[s.st_size, s.st_mtime_ns] for s in stats] + [text, prompt]
    packed = any(file.suffix == ".gz" for file in files)
    num_bytes = None if packed else sum(s.st_size for s in stats)
    make = maker(text, prompt)
    names = [file.name for file in files] if len(files) > 1 else ["train"]
    parts = lambda: zip(names, map(_records, files), strict=True)
    return Source(path.name, identity, num_bytes, lambda: documents(parts(), make), bool(prompt))


def is_jsonl(path: Path) -> bool:
    """Tell whether this is such a file, or a folder whose visible entries all are."""
    if path.is_dir():
        files = [file for file in path.iterdir() if not file.name.startswith(".")]
        return bool(files) and all(file.is_file() and is_jsonl(file) for file in files)
    return path.name.endswith(SUFFIXES)


def maker(text: str, prompt: str) -> Callable[[dict], tuple[bytes, bytes]]:
    """Return a function from a record to UTF-8 of prompt and text; its ValueError names what the record lacks."""
    parts = [_template(prompt) if prompt else lambda record: "", _template(text)]
    return lambda record: tuple(part(record).encode() for part in parts)


def _template(spec: str) -> Callable[[dict], str]:
    if "{" not in spec and "}" not in spec:
        return lambda record: _value(record, spec)
    try:
        parts = list(string.Formatter().parse(spec))
    except ValueError as error:
        raise ValueError(f"template {spec!r}: {error}") from None
    for _, field, how, conversion in parts:
        if field == "" or how or conversion:
            raise ValueError(f"template {spec!r}: expected names of fields in braces, such as {{question}}")
    return lambda record: "".join(
        literal + (_value(record, field) if field is not None else "") for literal, field, _, _ in parts
    )


def _value(record: dict, field: str) -> str:
    if field not in record:
        raise ValueError(f"no field {field!r}, only {', '.join(map(repr, record)) or 'an empty object'}")
    value = record[field]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"field {field!r} is {type(value).__name__}, expected text or a number")
    return str(value)


def documents(parts: Iterable[tuple[str, Iterable]], make: Callable) -> Iterator[Document]:
    """Yield the documents of records.

    Args:
        parts: pairs of the name of a split, or a file name that begins with it, and its records, each preceded by
            its place for error messages.
        make: returned by `maker`.
    """
    parts = [(_named_split(name), records) for name, records in parts]
    given = {split for split, _ in parts}
    split_of = splitter([split for split in (1, 2) if split not in given])
    for split, records in parts:
        for place, record in records:
            try:
                prompt, text = make(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if text:
                yield Document(split or split_of(prompt + text), [text], prompt)


def _named_split(name: str) -> int:
    """Index in SPLITS for the name of a file or split; train unless it says otherwise."""
    match = _SPLIT_NAME.match(name)
    return match.lastindex - 1 if match else 0


def _records(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield place and content of each line that is not blank."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", parse_json(line.rstrip())
    except ValueError as error:
        raise ValueError(f"{file}:{number}: {error}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: damaged after line {number}: {error}") from None
