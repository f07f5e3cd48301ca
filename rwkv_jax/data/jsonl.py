"""JSONL: one object per line; the text is a field, or built from a template.

`text` and `prompt` each name a field or, where they hold braces, are templates of fields:

    text="text"
    prompt="Question: {question}\\n\\nAnswer:", text=" {answer}"

The prompt precedes the text and is not a target. The two are tokenized separately, so no token spans both. Objects
whose text is empty are left out. Files may be compressed by gzip, bzip2 or xz.
"""

import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rwkv_jax import files
from rwkv_jax.data import contents
from rwkv_jax.data.corpus import READ, Document, Source, split_named, splitter

PLAIN = {"text": "text", "prompt": ""}  # the default fields


def source(path: Path, text: str, prompt: str) -> Source | None:
    """Return the source of a file or a folder; None if it holds no JSON lines.

    A file whose name, or else folder, begins with the word train, valid (or validation, val, dev) or test belongs to
    that split, any other to train. `splitter` takes missing splits from train.
    """
    tally = Counter()
    named = find(path, text, prompt, tally)
    if not named:
        return None
    stats = [file.stat() for _, file in named]
    identity = [str(file) for _, file in named] + [[s.st_size, s.st_mtime_ns] for s in stats] + [text, prompt]
    packed = any(contents.packing(file) for _, file in named)
    num_bytes = None if packed else sum(s.st_size for s in stats)
    make = maker(text, prompt)
    parts = lambda: ((name if len(named) > 1 else "train", _records(file)) for name, file in named)
    return Source(path.name, identity, num_bytes, lambda: documents(parts(), make, tally), tally, bool(prompt))


def find(path: Path, text: str, prompt: str, tally: Counter) -> list[tuple[str, Path]]:
    """Return names and paths of the files of JSON lines; count the others in `tally`.

    Others in the folder, such as a README, are left out if the user names fields, or if the JSON lines hold at least
    as many bytes (compressed others do not count). Else all files are read as text, and the result is empty.
    """
    if not path.is_dir():
        return [(path.name, path)] if path.is_file() and contents.is_json_lines(path) else []
    named = contents.visible(path, tally)
    is_found = {name: contents.is_json_lines(file) for name, file in named}
    found = [(name, file) for name, file in named if is_found[name]]
    others = [file for name, file in named if not is_found[name]]
    num_bytes = sum(file.stat().st_size for _, file in found)
    are_named = {"text": text, "prompt": prompt} != PLAIN
    if not are_named and num_bytes < sum(file.stat().st_size for file in others if not contents.packing(file)):
        return []
    tally["files", READ] += len(found)
    tally["files", "not JSON lines"] += len(others)
    return found


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
    if isinstance(value, float) and not math.isfinite(value):  # pandas writes missing values as NaN
        raise ValueError(f"field {field!r} is {value}, expected text or a finite number")
    return str(value)


def documents(parts: Iterable[tuple[str, Iterable]], make: Callable, tally: Counter) -> Iterator[Document]:
    """Yield the documents of records; at the end, `tally` has the numbers of records with and without text.

    Args:
        parts: pairs of (name of a split, or a path that contains one; its records, each with its place for error
            messages).
        make: returned by `maker`.
    """
    parts = [(_named_split(name), records) for name, records in parts]
    given = {split for split, _ in parts}
    split_of = splitter([split for split in (1, 2) if split not in given])
    counts = Counter()
    for split, records in parts:
        for place, record in records:
            try:
                prompt, text = make(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            counts["objects", READ if text else "without text"] += 1
            if text:
                yield Document(split or split_of(prompt + text), [text], prompt)
    tally |= counts  # a union, so that reading the documents again adds nothing


def _named_split(path: str) -> int:
    """Return the index in SPLITS that a path names, by the last of its parts that names one; train if none does."""
    for name in reversed(path.split("/")):
        if (split := split_named(name)) is not None:
            return split
    return 0


def _records(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield place and content of each line that is not blank."""
    number = 0
    with contents.opened(file) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", files.parse_json(line.rstrip())
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        except contents.DAMAGED as error:
            raise ValueError(f"{file}: damaged after line {number}: {error}") from None
