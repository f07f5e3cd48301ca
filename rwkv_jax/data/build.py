"""Text -> memory-mapped token files in the cache, built once for each text and tokenizer.

<cache>/<name>-<key>/train.bin      the tokens of this split; valid and test likewise
<cache>/<name>-<key>/train.starts   int64, where its documents begin
<cache>/<name>-<key>/train.mask     uint8, 0 for tokens of a prompt; only for sources with prompts
"""

import contextlib
import hashlib
import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np

from rwkv_jax.data import cache, contents, hub, jsonl, megatron, named, tokenfiles
from rwkv_jax.data import text as texts
from rwkv_jax.data.corpus import SEPARATOR, SPLITS, Corpus, Source, Split, left_out
from rwkv_jax.data.encode import Piece, encode
from rwkv_jax.data.tokenizers import NAMES, TOKENIZER_FILE, ByteTokenizer, Tokenizer, characters, get_tokenizer, save
from rwkv_jax.files import check_output, user_path


def prepare(source: str = "stdlib", tokenizer: str = "bytes", text: str = "text", prompt: str = "") -> Corpus:
    """Return the tokens of `source`, from the cache or built now.

    Args:
        source: "stdlib", a public corpus (enwik8, text8, wikitext-103, tinystories, classic-books: see `data.named`),
            "hf:NAME[:SPLIT]" (a dataset of the hub, or of a folder: see `data.hub`), or a path:
            a text file: cut by position, at 90 and 95 % of its bytes;
            a folder of text files: see `data.text`;
            JSON lines, or a folder of such, whatever their names: see `data.jsonl`;
            `.npy`, or a Megatron pair by either file or its prefix: tokens, see `data.tokenfiles`.
        tokenizer: "bytes" (a file may then hold any bytes), "characters" (those of the training split; the result
            names the file that lists them), or another argument of `get_tokenizer`; for a token file, the tokenizer
            that made it.
        text: for JSONL and `hf:`, the field or template of the text.
        prompt: for JSONL and `hf:`, the field or template of what precedes the text and is not a target.

    One line on stderr reports how many files or objects are left out, and why.

    Raises:
        FileNotFoundError: no such source or tokenizer.
        OSError: a download failed.
        ValueError: the source is damaged or compressed, holds no text, is too small for three splits, is not UTF-8,
            which every tokenizer but bytes needs, or has no fields that `text` or `prompt` could name.
    """
    encoder = None if tokenizer == "characters" else get_tokenizer(tokenizer)
    encoder_id = encoder.name if encoder else tokenizer
    if encoder_id not in ("characters", *NAMES):
        encoder_id = hashlib.sha256(user_path(tokenizer).read_bytes()).hexdigest()
    path = _path(source)
    if path and (file := tokenfiles.find(path)):
        _expect_no_fields(source, text, prompt)
        if encoder is None:
            raise ValueError(f"{source} holds tokens, not text: name the tokenizer that made them")
        return tokenfiles.read(file, encoder, encoder_id)
    found = _find(source, encoder, text, prompt)
    folder = cache.folder(found.name, [found.identity, encoder_id])
    at_first = Counter(found.tally)  # known before the documents are read

    def make(partial: Path) -> dict:
        if encoder is None:
            trained = (d for d in found.documents() if d.split == 0)
            save(characters(b"".join([d.prompt, *d.blocks]).decode() for d in trained), partial)
        record = _write(partial, found, source, encoder or get_tokenizer(str(partial / TOKENIZER_FILE)), encoder_id)
        return record | {"tally": [[*key, n] for key, n in (found.tally - at_first).items()]}

    with _expect_utf8(source, tokenizer):
        record = cache.made(folder, make)
    _say_left_out(source, at_first + Counter({(what, reason): n for what, reason, n in record["tally"]}))
    encoder = encoder or get_tokenizer(str(folder / TOKENIZER_FILE))
    splits = [_read(folder, split, record) for split in SPLITS]
    return Corpus(found.name, encoder.name, encoder.vocab_size, record["sha256"], *splits)


def to_megatron(source: str, tokenizer: str, prefix: str, text: str = "text") -> int:
    """Write the documents of `source` to `PREFIX.bin` and `PREFIX.idx`, in its order; return their number.

    The files equal those of the released converters byte for byte: token 0 follows each document, and tokens are
    uint16 where that holds the vocabulary, else int32.

    Args:
        source: text or JSONL, as for `prepare`. ValueError where it holds tokens already.
    """
    for ending in (".bin", ".idx"):
        check_output(megatron.with_ending(user_path(prefix), ending))
    if (path := _path(source)) and tokenfiles.find(path):
        raise ValueError(f"{source} holds tokens, expected text")
    encoder = get_tokenizer(tokenizer)
    found = _find(source, encoder, text, "")
    documents = (
        np.concatenate([*(tokens for _, tokens in document), np.array([SEPARATOR], np.uint8)])
        for _, document in groupby(encode(found, encoder), key=_document_number)
    )
    dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.int32
    with _expect_utf8(source, tokenizer):
        num_documents = megatron.write(user_path(prefix), documents, dtype)
    _say_left_out(source, found.tally)
    return num_documents


def has_fields(source: str, text: str = "text", prompt: str = "") -> bool:
    """Return whether the source is JSON lines or `hf:`, to which `text` and `prompt` apply."""
    if path := _path(source):
        return not tokenfiles.find(path) and bool(jsonl.find(path, text, prompt, Counter()))
    return source.startswith(hub.PREFIX)


def _path(source: str) -> Path | None:
    is_name = source in ("stdlib", *named.NAMED) or source.startswith(hub.PREFIX)
    return None if is_name else contents.absolute(user_path(source))


def _expect_no_fields(source: str, text: str, prompt: str) -> None:
    if {"text": text, "prompt": prompt} != jsonl.PLAIN:
        fields = f"text={text!r} and prompt={prompt!r}"
        raise ValueError(f"{source} holds no JSON lines (one object a line), to which {fields} could apply")


def _say_left_out(source: str, tally: Counter) -> None:
    if line := left_out(tally, f"{source}: "):
        print(line, file=sys.stderr)


@contextlib.contextmanager
def _expect_utf8(source: str, tokenizer: str):
    try:
        yield
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not UTF-8, which tokenizer {tokenizer} needs") from None


def _find(source: str, encoder: Tokenizer | None, text: str, prompt: str) -> Source:
    if source.startswith(hub.PREFIX):
        return hub.source(source, text, prompt)
    if (path := _path(source)) and (found := jsonl.source(path, text, prompt)):
        return found
    _expect_no_fields(source, text, prompt)
    return (named if source in named.NAMED else texts).source(source, exact=isinstance(encoder, ByteTokenizer))


def _document_number(encoded: tuple[Piece, np.ndarray]) -> int:
    return encoded[0].document_number


class _SplitFiles:
    """The files of one split, open for appending."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, split: str, dtype, has_prompts: bool):
        self.tokens = stack.enter_context((folder / f"{split}.bin").open("wb"))
        self.mask = stack.enter_context((folder / f"{split}.mask").open("wb")) if has_prompts else None
        self.dtype = dtype
        self.starts, self.names, self.num_tokens, self.num_bytes = [], [], 0, 0

    def begin(self, name: str) -> None:
        self.starts.append(self.num_tokens)
        self.names.append(name)
        self._append(np.array([SEPARATOR]), is_target=True)  # the model learns where a document ends

    def add(self, piece: Piece, tokens: np.ndarray) -> None:
        self._append(tokens, is_target=not piece.is_prompt)
        self.num_bytes += len(piece.text)

    def _append(self, tokens: np.ndarray, is_target: bool) -> None:
        self.tokens.write(tokens.astype(self.dtype, copy=False).data)
        self.num_tokens += len(tokens)
        if self.mask:
            self.mask.write(bytes([is_target]) * len(tokens))


def _write(folder: Path, found: Source, source: str, encoder: Tokenizer, encoder_id: str) -> dict:
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    with contextlib.ExitStack() as stack:
        outs = [_SplitFiles(stack, folder, split, dtype, found.has_prompts) for split in SPLITS]
        for _, document in groupby(encode(found, encoder), key=_document_number):
            for i, (piece, tokens) in enumerate(document):
                out = outs[piece.document.split]
                if i == 0:
                    out.begin(piece.document.name)
                out.add(piece, tokens)
    if not all(out.starts for out in outs):
        num_documents = sum(len(out.starts) for out in outs)
        found = f"{source} holds {num_documents} documents with text"
        raise ValueError(f"{found}: too few for train, valid and test; copies count as one")
    sha256 = hashlib.sha256()
    for kind in ("bin", "mask") if found.has_prompts else ("bin",):
        for split in SPLITS:
            sha256.update(np.memmap(folder / f"{split}.{kind}", mode="r"))
    bounds = [(out.num_tokens, out.starts) for out in outs]
    sha256.update(json.dumps([encoder_id, dtype.name, bounds]).encode())
    splits = {}
    for out, split in zip(outs, SPLITS, strict=True):
        np.array(out.starts, np.int64).tofile(folder / f"{split}.starts")
        splits[split] = {"num_bytes": out.num_bytes, "names": out.names if any(out.names) else []}
    return {"sha256": sha256.hexdigest(), "dtype": dtype.name, "has_prompts": found.has_prompts, "splits": splits}


def _read(folder: Path, split: str, record: dict) -> Split:
    tokens = np.memmap(folder / f"{split}.bin", record["dtype"], mode="r")
    mask = np.memmap(folder / f"{split}.mask", np.uint8, mode="r") if record["has_prompts"] else None
    starts = np.fromfile(folder / f"{split}.starts", np.int64)
    about = record["splits"][split]
    return Split(tokens, starts, tuple(about["names"]), about["num_bytes"], mask)
