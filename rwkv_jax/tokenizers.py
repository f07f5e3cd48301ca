"""Text <-> token ids: the 256 bytes themselves, or any `tokenizer.json` of the `tokenizers` library.

A tokenizer is a frozen value with

    name                          "bytes" or the path it was read from, as `get_tokenizer` takes it
    vocab_size                    ids lie in [0, vocab_size)
    encode(text)                  list of ids
    decode(ids)                   text; bytes that are not UTF-8 become U+FFFD
    encode_documents(documents)   the same as `encode` for many or long texts, each an iterable of blocks of
                                  UTF-8 bytes: pairs of document index and array of ids, in order
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers


@dataclass(frozen=True)
class ByteTokenizer:
    """One token per UTF-8 byte; the id is the byte's value."""

    name: str = "bytes"
    vocab_size: int = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(np.asarray(ids).tolist()).decode(errors="replace")

    def encode_documents(self, documents: Iterable[Iterable[bytes]]) -> Iterator[tuple[int, np.ndarray]]:
        """uint8 views of the blocks, which may hold any bytes."""
        for index, blocks in enumerate(documents):
            for block in blocks:
                yield index, np.frombuffer(block, np.uint8)


# Where a long text may be cut: before a space between words, or after a lone line break. No pre-tokenizer of the
# GPT-2, NeoX and GPT-4 kind joins across either. One that puts a space before its input tells the pieces apart: then
# texts stay whole.
_CUT = re.compile(rb"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[!-~]\n)(?=[!-~])")
_CUT_SAMPLE = "some words of a text\nand another line\nas an example\n"
_PIECE_BYTES = 1 << 16
_PIECES_AT_ONCE = 16


@dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer of the `tokenizers` library. Special tokens are known by their text, and decode to it."""

    name: str
    vocab_size: int
    library: tokenizers.Tokenizer
    cuttable: bool  # whether pieces cut at `_CUT` have the tokens of the whole

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def encode_documents(self, documents: Iterable[Iterable[bytes]]) -> Iterator[tuple[int, np.ndarray]]:
        """uint32 arrays, by all threads of the library; UnicodeDecodeError unless the bytes are UTF-8."""
        pieces = ((index, piece) for index, blocks in enumerate(documents) for piece in self._pieces(blocks))
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            texts = [piece.decode() for _, piece in batch]
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
            for (index, _), encoding in zip(batch, encodings, strict=True):
                yield index, np.array(encoding.ids, np.uint32)

    def _pieces(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        return _pieces(blocks) if self.cuttable else filter(None, [b"".join(blocks)])


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        rest += block
        begin = 0
        while cut := _CUT.search(rest, begin + _PIECE_BYTES):
            yield rest[begin : cut.start()]
            begin = cut.start()
        rest = rest[begin:]
    if rest:
        yield rest


Tokenizer = ByteTokenizer | FileTokenizer


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a `tokenizer.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not one that the `tokenizers` library reads.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not Path(name).is_file():
        raise FileNotFoundError(f"no tokenizer file {name}: expected 'bytes' or the path of a tokenizer.json")
    try:
        library = tokenizers.Tokenizer.from_file(str(name))
        vocab_size = 1 + max(library.get_vocab().values())  # not the count: ids may have gaps
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{name} is not a file that the tokenizers library reads: {error}") from None
    ids = lambda text: library.encode(text, add_special_tokens=False).ids
    pieces = [piece.decode() for piece in _CUT.split(_CUT_SAMPLE.encode())]
    cuttable = [token for piece in pieces for token in ids(piece)] == ids(_CUT_SAMPLE)
    return FileTokenizer(str(name), vocab_size, library, cuttable)


def of_model(path, vocab_size: int) -> str:
    """Name of the tokenizer of the model at `path`: the one that its workdir names, or "bytes" for 256 tokens.

    Raises:
        ValueError: neither tells.
    """
    config = Path(path) / "config.json"
    name = json.loads(config.read_text()).get("tokenizer") if config.is_file() else None
    if name is None and vocab_size != ByteTokenizer.vocab_size:
        raise ValueError(f"expected --tokenizer=PATH of the tokenizer.json with this vocabulary of {vocab_size}")
    return name or "bytes"


# An incomplete character is at most 3 tokens, so when this many wait, what they hold is not UTF-8.
_MAX_WAITING = 8


class TextStream:
    """Text of tokens that come one at a time, in pieces that never break a UTF-8 character.

    The pieces joined equal `decode` of all ids for bytes and byte-level BPE, invalid bytes included. A push
    decodes a few tokens only, however long the stream.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._restart([], 0)

    def _restart(self, tokens: list[int], num_held: int) -> None:
        """Wait for what follows `tokens`, of whose text all but the last `num_held` characters are out."""
        self._tokens, self._num_shown = tokens, len(self._decode(tokens)) - num_held
        self._waiting_from = 0 if num_held else len(tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character lacks bytes."""
        self._tokens.append(int(token))
        text, num_shown = self._decode(self._tokens), self._num_shown
        if not text.endswith("\ufffd"):
            # What was new is the context of what comes: some decoders strip the first space of a text.
            self._restart(self._tokens[self._waiting_from :], 0)
            return text[num_shown:]
        if len(self._tokens) - self._waiting_from < _MAX_WAITING:
            return ""
        self._restart(self._tokens[-_MAX_WAITING:], 1)
        return text[num_shown:-1]

    def flush(self) -> str:
        """The rest: what an incomplete last character decodes to. The stream starts anew."""
        rest = self._decode(self._tokens)[self._num_shown :]
        self._restart([], 0)
        return rest
