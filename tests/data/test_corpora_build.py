"""`prepare`: the tokens of each tokenizer, and sources that it refuses."""

import os

import numpy as np
import pytest
from texts import folder_of, prose, splits_of

from rwkv_jax.data import SEPARATOR, prepare
from rwkv_jax.data.tokenizers import get_tokenizer


def test_prepare_returns_a_read_only_memory_map(tmp_path):
    (tmp_path / "text.txt").write_text(prose(0))
    tokens = prepare(str(tmp_path / "text.txt")).train.tokens
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_prepare_with_a_trained_tokenizer_encodes_each_document(tmp_path, bpe):
    texts = {f"{i}.txt": prose(i, lines=5) + "\nthe quick brown fox\n" for i in range(60)}
    source = folder_of(tmp_path / "books", texts)
    corpus, as_bytes = prepare(source, bpe), prepare(source)
    tokenizer = get_tokenizer(bpe)
    assert (corpus.tokenizer, corpus.vocab_size) == (bpe, tokenizer.vocab_size)
    assert corpus.sha256 != as_bytes.sha256
    for split, expected in zip(splits_of(corpus), splits_of(as_bytes), strict=True):
        assert split.tokens.dtype == np.uint16
        assert (split.names, split.num_bytes) == (expected.names, expected.num_bytes)
        ends = [*split.starts[1:], len(split.tokens)]
        for start, end, name in zip(split.starts, ends, split.names, strict=True):
            assert split.tokens[start] == SEPARATOR
            assert split.tokens[start + 1 : end].tolist() == tokenizer.encode(texts[name])


BINARY = {"a.bin": b"\xff\xfe", "b.bin": bytes(10)}
SOURCES = {
    "no corpus {}: expected 'stdlib', a name such as enwik8, or a path": lambda path: None,
    "{} is a pipe or device, and a corpus is read twice: expected a file or a folder": os.mkfifo,
    "{} is empty: expected a text file, or a folder of visible text files": lambda path: path.mkdir(),
    "{} holds no UTF-8 text; left out: 2 of 2 files (not UTF-8 text: 2)": lambda path: folder_of(path, BINARY),
    "{} holds 9 bytes of text: too few for train, valid and test": lambda path: path.write_text("9 letters"),
}


@pytest.mark.parametrize("line", SOURCES)
def test_prepare_refuses_a_source_without_text_and_leaves_no_files(tmp_path, cache, line):
    SOURCES[line](tmp_path / "source")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        prepare(str(tmp_path / "source"))
    assert str(raised.value) == line.format(tmp_path / "source")
    assert not [path for path in cache.glob("*") if path.name != "lock"]


def test_prepare_refuses_bytes_that_are_not_utf8_unless_tokenized_as_bytes(tmp_path, cache, bpe):
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    (tmp_path / "data.bin").write_bytes(data)
    for tokenizer in (bpe, "characters"):
        with pytest.raises(ValueError, match=rf"data\.bin is not UTF-8, which tokenizer {tokenizer} needs$"):
            prepare(str(tmp_path / "data.bin"), tokenizer)
        assert [path.name for path in cache.iterdir()] == ["lock"]
    splits = splits_of(prepare(str(tmp_path / "data.bin")))
    assert b"".join(split.tokens[1:].tobytes() for split in splits) == data
