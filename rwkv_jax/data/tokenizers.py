"""Text <-> token ids: bytes, characters, any `tokenizer.json` of the `tokenizers` library, the World vocabulary.

A tokenizer is a frozen value with

    name                          "bytes", "world", or the path it was read from, as `get_tokenizer` takes it
    vocab_size                    ids lie in [0, vocab_size)
    encode(text)                  list of ids; ValueError if the text cannot be encoded
    decode(ids)                   text; bytes that are not UTF-8 become U+FFFD, ids without an entry ""
    encode_documents(documents)   the same as `encode` for many or long texts, each an iterable of blocks of
                                  UTF-8 bytes: pairs of document index and array of ids, in order

Formats are detected from the content: a `tokenizer.json` (`characters` makes one whose tokens are characters), the
character list that the released training code writes, {"0": "\\n", ...} in UTF-16, or the World vocabulary.

Encoding is deterministic: truncation, padding and BPE dropout that a `tokenizer.json` stores are not applied, which
one line on stderr reports, and its post-processor adds no tokens. Its added tokens, special or not, are matched in
any text, and its normaliser may change the text.
"""

import ast
import codecs
import json
import re
import string
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from rwkv_jax import files

TOKENIZER_FILE = "tokenizer.json"
WORLD_FILE = "rwkv_vocab_v20230424.txt"  # as the released World models carry it
_CONFIG_FILE = "tokenizer_config.json"
FILES = (TOKENIZER_FILE, WORLD_FILE, _CONFIG_FILE)  # that `save` writes or removes
NAMES = ("bytes", "world")  # those that need no file


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
        """Yield uint8 views of the blocks, which may hold any bytes."""
        for index, blocks in enumerate(documents):
            for block in blocks:
                yield index, np.frombuffer(block, np.uint8)


# Where a long text may be cut: before a space between words, or after a single line break, unless a slash follows,
# which GPT-4o's pre-tokenizer joins to it. Others of the GPT-2, NeoX and GPT-4 kind join nothing across these.
# Texts are not cut if a token can span a cut, or if pieces of the sample have other tokens than the whole: a tokenizer
# may prepend a space to its input. The sample has every character that can be next to a cut.
_CUT = re.compile(rb"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[!-~]\n)(?=[!-.0-~])")
_CUT_TOKEN = re.compile(rb"[A-Za-z] [A-Za-z\0]|[!-~\0]\n[!-.0-~]")  # \0 delimits tokens
_CUT_SAMPLE = "some words of a text\nand another line\nas an example\n" + "\n".join(
    [" ".join(string.ascii_letters), *map(chr, range(ord("!"), ord("~") + 1)), ""]
)
_PIECE_BYTES = 1 << 16
_PIECES_AT_ONCE = 16


@dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer of the `tokenizers` library. Special tokens are matched by their text, and decode to it."""

    name: str
    vocab_size: int
    library: tokenizers.Tokenizer
    cuttable: bool  # whether pieces cut at `_CUT` have the tokens of the whole

    def encode(self, text: str) -> list[int]:
        return self._batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def encode_documents(self, documents: Iterable[Iterable[bytes]]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield uint32 arrays, by all threads of the library; UnicodeDecodeError unless the bytes are UTF-8."""
        return _encode_pieces(self._batch, partial(pieces, self), documents)

    def _batch(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            "".join(texts).encode()  # for a lone surrogate, UnicodeEncodeError, a ValueError, is clearer
            raise ValueError(f"tokenizer {self.name} cannot encode the text: {error}") from None
        return [encoding.ids for encoding in encodings]


@dataclass(frozen=True)
class WorldTokenizer:
    """Greedy longest match among 65,529 byte strings. Id 0 ends a text and has no bytes."""

    name: str
    library: object
    token_bytes: tuple[bytes, ...]  # [vocab_size]
    cuttable: bool
    vocab_size: int = 65_536  # of the released models; the last ids have no entry

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        ids = np.asarray(ids, np.int64)
        known = ids[ids < self.vocab_size]  # a padded vocabulary has more
        return b"".join(self.token_bytes[i] for i in known).decode(errors="replace")

    def encode_documents(self, documents: Iterable[Iterable[bytes]]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield uint32 arrays, by all threads of the library; UnicodeDecodeError unless the bytes are UTF-8."""
        return _encode_pieces(self.library.encode_batch, partial(pieces, self), documents)


def _encode_pieces(encode_batch, cut, documents) -> Iterator[tuple[int, np.ndarray]]:
    pieces = ((index, piece) for index, blocks in enumerate(documents) for piece in cut(blocks))
    while batch := list(islice(pieces, _PIECES_AT_ONCE)):
        texts = [piece.decode() for _, piece in batch]
        for (index, _), ids in zip(batch, encode_batch(texts), strict=True):
            yield index, np.array(ids, np.uint32)


def pieces(tokenizer, blocks: Iterable[bytes], num_bytes: int = _PIECE_BYTES) -> Iterator[bytes]:
    """Yield a text in pieces not much longer than `num_bytes`, whose tokens joined are those of the whole.

    Text without a place where it can be cut, such as Chinese without ASCII spaces, is one piece.
    """
    if isinstance(tokenizer, ByteTokenizer):
        yield from blocks
        return
    if not tokenizer.cuttable:
        blocks, num_bytes = [b"".join(blocks)], sys.maxsize
    rest, searched = b"", 0
    for block in blocks:
        rest += block
        begin = 0
        while cut := _CUT.search(rest, max(begin + num_bytes, searched)):
            yield rest[begin : cut.start()]
            begin = cut.start()
        rest = rest[begin:]
        searched = len(rest) - 1  # the last place that further text may make a cut; no text is searched twice
    if rest:
        yield rest


Tokenizer = ByteTokenizer | FileTokenizer | WorldTokenizer


def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `name`: "bytes", "world", or a file, whose format is detected from its content.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has none of the formats above, or a package is missing.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "world":
        return _world(name, Path(_world_package().__file__).with_name(WORLD_FILE))
    path = files.user_path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {name}: expected 'bytes', 'world' or the path of a tokenizer.json")
    match _format(path):
        case "world":
            return _world(str(name), path)
        case "characters":
            return _tokenizer(str(name), _released_characters(path))
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # which editors prepend
        library = tokenizers.Tokenizer.from_buffer(content)  # a path need not be UTF-8
        vocabulary = library.get_vocab()
        max(vocabulary.values())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{name} is not a file that the tokenizers library reads: {error}") from None
    _switch_off_settings(str(name), library)
    return ByteTokenizer() if vocabulary == _BYTE_VOCABULARY else _tokenizer(str(name), library)


def _format(path: Path) -> str:
    with path.open("rb") as file:
        beginning = file.read(64).removeprefix(b"\xff\xfe").removeprefix(codecs.BOM_UTF8).replace(b"\0", b"")
    if re.match(rb"\d+ b?['\"]", beginning):
        return "world"
    if not re.match(rb'\s*\{\s*"\d+"\s*:', beginning):
        return "library"
    try:
        return "world" if any(isinstance(entry, list) for entry in _numbered(path).values()) else "characters"
    except ValueError:  # `_released_characters` reports it
        return "characters"


def _numbered(path: Path) -> dict:
    """Return the entries of {"0": ..., "1": ...} in UTF-8 or UTF-16."""
    data = path.read_bytes().removeprefix(b"\xff\xfe")
    return files.parse_json(data.decode("utf-16le" if b"\0" in data[:64] else "utf-8-sig"))


def _switch_off_settings(name: str, library: tokenizers.Tokenizer) -> None:
    """Disable settings that make ids depend on the length of a text or on chance."""
    dropout = getattr(library.model, "dropout", None)
    stored = {"truncation": library.truncation, "padding": library.padding, "dropout": dropout}
    library.no_truncation()
    library.no_padding()
    if dropout is not None:
        library.model.dropout = None
    if any(stored.values()):
        _say_once(f"{name}: its {' and '.join(filter(stored.get, stored))} will not be applied")


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _tokenizer(name: str, library: tokenizers.Tokenizer) -> FileTokenizer:
    vocab_size = 1 + max(library.get_vocab().values())  # not the count: ids may have gaps
    tokenizer = FileTokenizer(name, vocab_size, library, False)
    if _lies_across_a_cut(_spellings(library)):
        return tokenizer
    pieces = [piece.decode() for piece in _CUT.split(_CUT_SAMPLE.encode())]
    try:
        cuttable = [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(_CUT_SAMPLE)
    except ValueError:  # a vocabulary without these letters
        cuttable = False
    return FileTokenizer(name, vocab_size, library, cuttable)


def _lies_across_a_cut(tokens: Iterable[bytes]) -> bool:
    return _CUT_TOKEN.search(b"\0".join([b"", *tokens, b""])) is not None


def _spellings(library: tokenizers.Tokenizer) -> list[bytes]:
    """Return UTF-8 of the texts that tokens stand for, as far as `_CUT_TOKEN` matches them."""
    normalise = library.normalizer.normalize_str if library.normalizer else str
    texts = list(library.get_vocab())
    for token in library.get_added_tokens_decoder().values():
        for content in (token.content, normalise(token.content)):
            texts.append("\n" * token.lstrip + content + " " * token.rstrip)  # they absorb adjacent white space
    return "\0".join(texts).translate(_SPACES).encode().split(b"\0")


_SPACES = str.maketrans("▁ĠĊ", "  \n")  # as SentencePiece and byte-level BPE write them


UNKNOWN = "\ufffd"


def characters(texts: Iterable[str]) -> FileTokenizer:
    """Return a tokenizer, not yet saved, of the characters of `texts` by code point.

    Id 0 is NUL, which separates documents; id 1 is U+FFFD, which stands for all other characters.
    """
    known = set()
    for text in texts:
        known.update(text)
    vocabulary = {character: i for i, character in enumerate(["\0", UNKNOWN, *sorted(known - {"\0", UNKNOWN})])}
    return _tokenizer("characters", _of_characters(vocabulary))


def _of_characters(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=UNKNOWN))  # no merges
    library.decoder = tokenizers.decoders.Fuse()
    return library


def _released_characters(path: Path) -> tokenizers.Tokenizer:
    try:
        entries = _numbered(path)
        vocabulary = {character: int(i) for i, character in entries.items()}
        if not all(isinstance(c, str) and len(c) == 1 for c in vocabulary) or len(vocabulary) != len(entries):
            raise ValueError("its values are not distinct characters")
        return _of_characters(vocabulary)
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path}: expected a list of characters, {{"0": "...", ...}}: {error}') from None


# The tokenizers library writes byte b as a printable character: itself, or one from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_VOCABULARY = {chr(b): b for b in _PRINTABLE} | {
    chr(0x100 + i): b for i, b in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


def _byte_library() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE(_BYTE_VOCABULARY, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _world_package():
    try:
        import pyrwkv_tokenizer  # optional: it has no wheel for every Python
    except ImportError:
        raise ValueError("the World tokenizer needs another package: pip install pyrwkv-tokenizer") from None
    return pyrwkv_tokenizer


@cache
def _world(name: str, path: Path) -> WorldTokenizer:
    # The package cannot decode bytes that are not UTF-8 and panics on ids without an entry: its file is read here too.
    token_bytes = [b""] * WorldTokenizer.vocab_size
    try:
        text = path.read_text(encoding="utf-8-sig")
        for i, token in _world_json(text) if text.lstrip().startswith("{") else _world_lines(text):
            token_bytes[i] = token
    except (ValueError, SyntaxError, IndexError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is not the World vocabulary: {error}") from None
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="") as lines:
        lines.write(_world_text(token_bytes))
        lines.flush()
        library = _world_package().WorldTokenizer(lines.name)
    return WorldTokenizer(name, library, tuple(token_bytes), not _lies_across_a_cut(token_bytes))


def _world_lines(text: str) -> Iterator[tuple[int, bytes]]:
    """Yield ids and tokens of lines such as "98 'a' 1"."""
    for line in text.splitlines():
        i, token, num_bytes = re.fullmatch(r"(\d+) (.+) (\d+)", line).groups()
        token = ast.literal_eval(token)
        token = token.encode() if isinstance(token, str) else token
        if len(token) != int(num_bytes):
            raise ValueError(f"token {i} does not have {num_bytes} bytes")
        yield int(i), token


def _world_json(text: str) -> Iterator[tuple[int, bytes]]:
    """Yield ids and tokens of {"98": "a", "129": [128], ...}; tokens that are not UTF-8 are lists of bytes."""
    for i, token in files.parse_json(text).items():
        if not i.isdecimal() or not isinstance(token, str | list):
            raise ValueError(f"entry {i!r}: expected a number, and its text or list of bytes")
        yield int(i), token.encode() if isinstance(token, str) else bytes(token)


def _world_text(token_bytes: Sequence[bytes]) -> str:
    return "".join(f"{i} {_literal(token)} {len(token)}\n" for i, token in enumerate(token_bytes) if token)


def _literal(token: bytes) -> str:
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def save(tokenizer: Tokenizer, folder) -> str:
    """Write the tokenizer into a folder, where `of_model` finds it; return the file's name.

    It is a `tokenizer.json`, which transformers' AutoTokenizer loads with the `tokenizer_config.json` beside it, or
    the World vocabulary, each file whole or not at all. A file of the other kind from an earlier save is removed.
    """
    folder = files.user_path(folder)
    if isinstance(tokenizer, WorldTokenizer):
        with files.written(folder / WORLD_FILE) as file:
            file.write(_world_text(tokenizer.token_bytes).encode())
        for other in (TOKENIZER_FILE, _CONFIG_FILE):
            (folder / other).unlink(missing_ok=True)
        return WORLD_FILE
    library = _byte_library() if isinstance(tokenizer, ByteTokenizer) else tokenizer.library
    data = (library.to_str(pretty=True) + "\n").encode()
    is_file = isinstance(tokenizer, FileTokenizer) and tokenizer.name != "characters"
    if is_file and (source := files.user_path(tokenizer.name)).is_file():
        # Copied byte for byte where possible: the file's hash identifies the tokenizer of a run.
        data = source.read_bytes() if _format(source) == "library" else data
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    config |= {role: token for role, token in roles.items() if token in special}
    for name, content in ((TOKENIZER_FILE, data), (_CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())):
        with files.written(folder / name) as file:
            file.write(content)
    (folder / WORLD_FILE).unlink(missing_ok=True)
    return TOKENIZER_FILE


_NEOX_SIZE = 50_277
_NEOX_HUB = "EleutherAI/gpt-neox-20b"


def of_model(path, vocab_size: int) -> str:
    """Return the argument of `get_tokenizer` for the tokenizer of the model at `path`.

    It is the one in a workdir or Hugging Face folder. Otherwise it is guessed from the vocabulary's size, which one
    line on stderr reports: 256 is bytes, 65,536 World, 50,277 and its paddings up to 50,432 the NeoX-20B file, which
    is searched for beside the model, in the current folder, and in the local Hugging Face cache.

    Raises:
        FileNotFoundError: the NeoX-20B file is in none of these places.
        ValueError: the size is none of these.
    """
    path = files.user_path(path)
    if path.is_dir() and (name := carried(path)):
        return name
    if vocab_size == ByteTokenizer.vocab_size:
        name = "bytes"
    elif vocab_size == WorldTokenizer.vocab_size:
        name = "world"
    elif vocab_size == _NEOX_SIZE or (_NEOX_SIZE < vocab_size <= 50_432 and vocab_size % 8 == 0):
        name = _find_neox(path if path.is_dir() else path.parent)
    else:
        raise ValueError(
            f"{path} has no tokenizer, and none is known for its vocabulary of {vocab_size}: "
            "expected tokenizer='bytes', 'world' or the path of its tokenizer.json"
        )
    print(f"{path} has no tokenizer: {name}, guessed from its vocabulary of {vocab_size}", file=sys.stderr)
    return name


def for_model(path, vocab_size: int, name: str | None = None) -> Tokenizer:
    """Return the tokenizer `name`, or else that of the model at `path`: see `of_model`.

    Raises:
        FileNotFoundError, ValueError: as from `of_model` and `get_tokenizer`, or it has more tokens than the model.
    """
    found = get_tokenizer(of_model(path, vocab_size) if name is None else name)
    if found.vocab_size > vocab_size:
        raise ValueError(f"tokenizer {found.name} has {found.vocab_size} tokens, the model only {vocab_size}")
    return found


def known_for_model(path, vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer of the model at `path`; None, and a line on stderr, where it is unknown."""
    try:
        return for_model(path, vocab_size)
    except (ValueError, OSError) as error:
        print(f"{error}; continued without a tokenizer", file=sys.stderr)
        return None


def warn_if_small(name: str, num_tokens: int, vocab_size: int) -> None:
    """Warn on stderr if over a tenth of a model's ids are beyond the tokenizer's.

    Vocabularies are not padded that much, so the model may have been trained with another tokenizer.
    """
    if 10 * num_tokens < 9 * vocab_size:
        sizes = f"has {num_tokens} tokens, the model {vocab_size}"
        print(f"tokenizer {name} {sizes}: the others have no text, is it the model's own?", file=sys.stderr)


def carried(folder: Path) -> str | None:
    """Return the argument of `get_tokenizer` for the one in a workdir or Hugging Face folder; None without one.

    Raises:
        ValueError: the config names a tokenizer that is not there.
    """
    config = folder / "config.json"
    name = files.read_json(config).get("tokenizer") if config.is_file() else None
    if name in NAMES:
        return name
    candidates = (folder / file for file in (TOKENIZER_FILE, WORLD_FILE))
    found = next((str(file) for file in candidates if file.is_file()), None)
    if isinstance(name, str) and found is None:
        raise ValueError(f"{config} names the tokenizer {name}, which is not in the folder")
    return found


def _find_neox(beside: Path) -> str:
    from huggingface_hub import try_to_load_from_cache

    folders = list(dict.fromkeys([beside, Path(".")]))
    candidates = [folder / name for folder in folders for name in ("20B_tokenizer.json", TOKENIZER_FILE)]
    if isinstance(cached := try_to_load_from_cache(_NEOX_HUB, TOKENIZER_FILE), str):
        candidates.append(Path(cached))
    for file in candidates:
        if file.is_file() and get_tokenizer(str(file)).vocab_size == _NEOX_SIZE:
            return str(file)
    raise FileNotFoundError(
        f"no NeoX-20B tokenizer in {' or '.join(map(str, folders))} or the Hugging Face cache: download "
        f"20B_tokenizer.json of BlinkDL/RWKV-LM, or tokenizer.json of {_NEOX_HUB}, or pass tokenizer=PATH"
    )


# An incomplete character is at most 3 tokens, so if this many are pending, their bytes are not UTF-8.
_MAX_WAITING = 8


class TextStream:
    """Incremental decoder of tokens, in pieces of text that never split a UTF-8 character.

    The pieces joined equal `decode` of all ids for bytes and byte-level BPE, invalid bytes included. A push
    decodes a few tokens only, however long the stream.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._restart([], 0)

    def _restart(self, tokens: list[int], num_held: int) -> None:
        """Make `tokens` the context of the next ones; all but the last `num_held` characters are returned."""
        self._tokens, self._num_shown = tokens, len(self._decode(tokens)) - num_held
        self._waiting_from = 0 if num_held else len(tokens)

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character lacks bytes."""
        before, self._tokens = self._tokens, [*self._tokens, int(token)]
        text, num_shown = self._decode(self._tokens), self._num_shown
        if before and self._decode([int(token)]) == "" and text == self._decode(before):
            self._tokens = before  # an id without text adds no context, and a character may continue after it
            return ""
        if not text.endswith("\ufffd"):
            # The new tokens are the context of the next: some decoders strip the first space of a text.
            self._restart(self._tokens[self._waiting_from :], 0)
            return text[num_shown:]
        if len(self._tokens) - self._waiting_from < _MAX_WAITING:
            return ""
        self._restart(self._tokens[-_MAX_WAITING:], 1)
        return text[num_shown:-1]

    def flush(self) -> str:
        """Return the rest, the decoding of an incomplete last character, and reset the stream."""
        rest = self._decode(self._tokens)[self._num_shown :]
        self._restart([], 0)
        return rest
