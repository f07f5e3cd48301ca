"""JSONL: one object a line, its text in a field or made by a template.

`text` and `prompt` each name a field or, where they hold braces, are templates of fields:

    text="text"
    prompt="Question: {question}\\n\\nAnswer:", text=" {answer}"

The prompt comes before the text and is not to be predicted. The two are tokenised one by one, so no token reaches
across their border. Objects whose text is empty are left out.
"""

import gzip
import json
import re
import string
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rwkv_jax.corpora.corpus import Document, Source, splitter

SUFFIXES = (".jsonl", ".jsonl.gz")
_SPLIT_NAME = re.compile(r"(train)|(valid|validation|val|dev)|(test)")


def source(path: Path, text: str, prompt: str) -> Source:
    """Of a file or a folder of them.

    Files whose names begin with train, valid (or validation, val, dev) and test are these splits; what is missing is
    taken from the rest, see `splitter`.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if is_jsonl(file))
    stats = [file.stat() for file in files]
    identity = [str(file) for file in files] + [[s.st_size, s.st_mtime_ns] for s in stats] + [text, prompt]
    packed = any(file.suffix == ".gz" for file in files)
    num_bytes = None if packed else sum(s.st_size for s in stats)
    make = maker(text, prompt)
    return Source(path.name, identity, num_bytes, lambda: _documents(files, make), bool(prompt))


def is_jsonl(path: Path) -> bool:
    """Whether it is such a file, or a folder of nothing else that is visible."""
    if path.is_dir():
        files = [file for file in path.iterdir() if not file.name.startswith(".")]
        return bool(files) and all(file.is_file() and is_jsonl(file) for file in files)
    return path.name.endswith(SUFFIXES)


def maker(text: str, prompt: str) -> Callable[[dict], tuple[bytes, bytes]]:
    """Record -> UTF-8 of prompt and text; ValueError says what the record lacks."""
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


def _documents(files: list[Path], make) -> Iterator[Document]:
    given = {file: named_split(file.name) if len(files) > 1 else 0 for file in files}
    split_of = splitter([split for split in (1, 2) if split not in given.values()])
    for file in files:
        for number, line in _lines(file):
            try:
                record = json.loads(line.rstrip())
                if not isinstance(record, dict):
                    raise ValueError(f"expected an object, found {type(record).__name__}")
                prompt, text = make(record)
            except UnicodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8: {error.reason}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None
            if text:
                yield Document(given[file] or split_of(prompt + text), [text], prompt)


def named_split(name: str) -> int:
    """Index in SPLITS of the split that a file or split of this name is; train unless it says otherwise."""
    match = _SPLIT_NAME.match(name)
    return match.lastindex - 1 if match else 0


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of the lines that are not blank."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: damaged after line {number}: {error}") from None
