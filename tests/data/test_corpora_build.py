"""`prepare`: tokens of each tokenizer, and sources that it refuses."""

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


def make_nothing(path):
    pass


def make_empty_folder(path):
    path.mkdir()


def make_empty_file(path):
    path.touch()


def make_binary_folder(path):
    folder_of(path, {"a.bin": b"\xff\xfe", "b.bin": bytes(10)})


def make_short_file(path):
    path.write_text("9 letters")


@pytest.mark.parametrize(
    ("make", "error", "line"),
    [
        (
            make_nothing,
            FileNotFoundError,
            "no corpus {}: expected 'stdlib', a name such as enwik8, or a path",
        ),
        (make_empty_folder, ValueError, "{} is empty: expected a text file, or a folder of visible text files"),
        (make_empty_file, ValueError, "{} is empty: expected a text file, or a folder of visible text files"),
        (make_binary_folder, ValueError, "{} holds no UTF-8 text"),
        (make_short_file, ValueError, "{} holds 9 bytes of text: too few for train, valid and test"),
    ],
)
def test_prepare_refuses_a_source_without_text_and_leaves_no_files(tmp_path, cache, make, error, line):
    make(tmp_path / "source")
    with pytest.raises(error) as raised:
        prepare(str(tmp_path / "source"))
    assert str(raised.value) == line.format(tmp_path / "source")
    assert not [path for path in cache.glob("*") if path.name != "lock"]


def test_prepare_refuses_an_unknown_name():
    with pytest.raises(
        FileNotFoundError, match=r"^no corpus enwik9: expected 'stdlib', a name such as enwik8, or a path"
    ):
        prepare("enwik9")


def test_prepare_refuses_bytes_that_are_not_utf8_for_a_trained_tokenizer(tmp_path, cache, bpe):
    (tmp_path / "data.bin").write_bytes(b"text \xff text" * 100)
    with pytest.raises(ValueError, match=r"data\.bin is not UTF-8, which tokenizer .*tokenizer\.json needs$"):
        prepare(str(tmp_path / "data.bin"), bpe)
    assert [path.name for path in cache.iterdir()] == ["lock"]
