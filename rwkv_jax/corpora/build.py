"""Text -> memory-mapped token files in the cache, made once for each text and tokenizer.

<cache>/<name>-<key>/train.bin      the tokens of this split; valid and test likewise
<cache>/<name>-<key>/train.starts   int64, where its documents begin
<cache>/<name>-<key>/train.mask     uint8, 0 where a token is given; only of sources with prompts
"""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rwkv_jax.corpora import cache, hub, jsonl, megatron, named, shards, tokenfiles
from rwkv_jax.corpora import text as texts
from rwkv_jax.corpora.corpus import SEPARATOR, SPLITS, Corpus, Source, Split
from rwkv_jax.files import user_path
from rwkv_jax.tokenizers import NAMES, TOKENIZER_FILE, Tokenizer, characters, get_tokenizer, save

_bar = functools.partial(tqdm, disable=None, leave=False)


def prepare(
    source: str = "stdlib", tokenizer: str = "bytes", text: str = "text", prompt: str = "", *, processes: int = 1
) -> Corpus:
    """The tokens of `source`, from the cache or made now.

    Args:
        source: "stdlib", a public corpus (enwik8, text8, wikitext-103, tinystories: see `corpora.named`),
            "hf:NAME[:SPLIT]" (a dataset of the hub, or of a folder: see `corpora.hub`), or a path:
            a text file: cut by position, at 90 and 95 % of its bytes;
            a folder of text files: split by the hash of their relative path or, when fewer than 20, laid end to end
            and cut like one file. Left out are hidden files, files that are not UTF-8 text, and files more than half
            of whose lines occur in files before them, by order of path;
            `.jsonl`, `.jsonl.gz` or a folder of such: see `corpora.jsonl`;
            `.npy`, or a Megatron pair by either file or its prefix: tokens, see `corpora.tokenfiles`.
        tokenizer: "bytes" (a file may then hold any bytes), "characters" (those of the training split; the result
            names the file that lists them), or what else `get_tokenizer` takes; of a file of tokens, what made it.
        text: of JSONL and `hf:`, the field or template of the text.
        prompt: of JSONL and `hf:`, the field or template of what comes before the text and is not to be predicted.
        processes: that make the tokens; 1 leaves that to the threads of the tokenizer's library. The tokens are the
            same. What is done when they are killed, or the disk is full, is not done again by the next call.

    Raises:
        FileNotFoundError: no such source or tokenizer.
        OSError: a download that fails; the next call goes on with it.
        ValueError: the source is damaged, holds no text, too little for three splits, or no UTF-8 for this tokenizer.
    """
    encoder = None if tokenizer == "characters" else get_tokenizer(tokenizer)
    is_named = encoder is None or encoder.name in NAMES
    encoder_id = tokenizer if is_named else hashlib.sha256(user_path(tokenizer).read_bytes()).hexdigest()
    path = user_path(source)
    if (
        source not in ("stdlib", *named.NAMED)
        and not source.startswith(hub.PREFIX)
        and (file := tokenfiles.find(path))
    ):
        if encoder is None:
            raise ValueError(f"{source} holds tokens, not text: name the tokenizer that made them")
        return tokenfiles.read(file, encoder, encoder_id, _bar)
    found = _find(source, path, tokenizer, text, prompt)
    folder = cache.folder(found.name, [found.identity, encoder_id])

    def make(partial: Path) -> dict:
        with _kept_if_killed(_done(folder), source, tokenizer):
            if encoder is None:
                save(characters(b"".join(d.blocks).decode() for d in found.documents() if d.split == 0), partial)
            return _write(
                partial, found, source, encoder or get_tokenizer(str(partial / TOKENIZER_FILE)), encoder_id, processes
            )

    record = cache.made(folder, make)
    encoder = encoder or get_tokenizer(str(folder / TOKENIZER_FILE))
    splits = [_read(folder, split, record) for split in SPLITS]
    return Corpus(found.name, encoder.name, encoder.vocab_size, record["sha256"], *splits)


def _read(folder: Path, split: str, record: dict) -> Split:
    tokens = np.memmap(folder / f"{split}.bin", record["dtype"], mode="r")
    mask = np.memmap(folder / f"{split}.mask", np.uint8, mode="r") if record["has_prompts"] else None
    its = record["splits"][split]
    return Split(
        tokens, np.fromfile(folder / f"{split}.starts", np.int64), tuple(its["names"]), its["num_bytes"], mask
    )


def to_megatron(source: str, tokenizer: str, prefix: str, text: str = "text", *, processes: int = 1) -> int:
    """Write the documents of `source` to `PREFIX.bin` and `PREFIX.idx`, in its order; returns their number.

    The files are those of the released converters, byte for byte: each document is followed by token 0, and tokens
    are uint16 where that holds the vocabulary, else int32.

    Args:
        source: text or JSONL, as for `prepare`.
    """
    encoder = get_tokenizer(tokenizer)
    target = user_path(prefix)
    found = _find(source, user_path(source), tokenizer, text, "")

    def documents():
        parts = []
        with _bar(desc="tokens", total=found.num_bytes, unit="B", unit_scale=True) as progress:
            for piece, tokens in shards.encode(found.documents(), encoder, _done(target), processes):
                if piece.name is not None and parts:
                    yield np.concatenate([*parts, [SEPARATOR]])
                    parts = []
                parts.append(tokens)
                progress.update(len(piece.text))
        if not parts:
            raise ValueError(f"{source} holds no text")
        yield np.concatenate([*parts, [SEPARATOR]])

    with _kept_if_killed(_done(target), source, tokenizer):
        return megatron.write(target, documents(), np.uint16 if encoder.vocab_size <= 1 << 16 else np.int32)


def _done(folder: Path) -> Path:
    """Where the shards lie that go into `folder`."""
    return folder.with_name(folder.name.removesuffix(".partial") + ".shards")


@contextlib.contextmanager
def _kept_if_killed(done: Path, source: str, tokenizer: str):
    """Shards go when their work is done or in vain; they stay where the same call may go on with them."""
    try:
        yield
    except UnicodeDecodeError:
        shutil.rmtree(done, ignore_errors=True)
        raise ValueError(f"{source} is not UTF-8, which tokenizer {tokenizer} needs") from None
    except ValueError:
        shutil.rmtree(done, ignore_errors=True)
        raise
    shutil.rmtree(done, ignore_errors=True)


def _find(source: str, path: Path, tokenizer: str, text: str, prompt: str) -> Source:
    if source.startswith(hub.PREFIX):
        return hub.source(source, text, prompt)
    if source in named.NAMED:
        return named.source(source, exact=tokenizer == "bytes", bar=_bar)
    if source != "stdlib" and path.exists() and jsonl.is_jsonl(path):
        return jsonl.source(path.resolve(), text, prompt)
    return texts.source(source, exact=tokenizer == "bytes", bar=_bar)


class _Out:
    """The growing files of one split."""

    def __init__(self, create: Callable, split: str, dtype, has_prompts: bool):
        self.tokens = create(f"{split}.bin")
        self.mask = create(f"{split}.mask") if has_prompts else None
        self.separator = np.array([SEPARATOR], dtype)
        self.starts, self.names, self.num_tokens, self.num_bytes = [], [], 0, 0

    def put(self, piece: shards.Piece, tokens: np.ndarray) -> None:
        if piece.name is not None:
            self.starts.append(self.num_tokens)
            self.names.append(piece.name)
            self._append(self.separator, True)  # that a document ends is to be predicted
        self._append(tokens, not piece.given)
        self.num_bytes += len(piece.text)

    def _append(self, tokens: np.ndarray, predicted: bool) -> None:
        self.tokens.write(tokens.data)
        self.num_tokens += len(tokens)
        if self.mask:
            self.mask.write(bytes([predicted]) * len(tokens))


def _write(folder: Path, found: Source, source: str, encoder: Tokenizer, encoder_id: str, processes: int) -> dict:
    dtype = np.min_scalar_type(encoder.vocab_size - 1)
    with contextlib.ExitStack() as stack:
        create = lambda name: stack.enter_context((folder / name).open("wb"))
        outs = [_Out(create, split, dtype, found.has_prompts) for split in SPLITS]
        progress = stack.enter_context(_bar(desc="tokens", total=found.num_bytes, unit="B", unit_scale=True))
        for piece, tokens in shards.encode(found.documents(), encoder, _done(folder), processes):
            outs[piece.split].put(piece, tokens)
            progress.update(len(piece.text))
        for out in outs:
            for file in filter(None, [out.tokens, out.mask]):
                cache.sync(file)
    if not all(out.starts for out in outs):
        num_documents = sum(len(out.starts) for out in outs)
        raise ValueError(f"{source} holds {num_documents} documents with text: too few for train, valid and test")
    sha256 = hashlib.sha256()
    for kind in (".bin", ".mask") if found.has_prompts else (".bin",):
        for split in SPLITS:
            with open(folder / f"{split}{kind}", "rb") as file:
                while block := file.read(1 << 24):
                    sha256.update(block)
    bounds = [(out.num_tokens, out.starts) for out in outs]
    sha256.update(json.dumps([encoder_id, dtype.name, bounds]).encode())
    splits = {}
    for out, split in zip(outs, SPLITS, strict=True):
        np.array(out.starts, np.int64).tofile(folder / f"{split}.starts")
        splits[split] = {"num_bytes": out.num_bytes, "names": out.names if any(out.names) else []}
    return {"sha256": sha256.hexdigest(), "dtype": dtype.name, "has_prompts": found.has_prompts, "splits": splits}
