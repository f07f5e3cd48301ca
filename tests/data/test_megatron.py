"""Megatron token files: equal to those of the released converters, read as corpora, refused when damaged."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from damage import cuts, flips
from texts import parts, splits_of, write_jsonl

from rwkv_jax.data import SEPARATOR, megatron, prepare, to_megatron

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize(
    "tokenizer, golden", [(str(GOLDENS / "binidx_tokenizer.json"), "binidx"), ("world", "binidx_world")]
)
def test_to_megatron_equals_the_released_converter(tmp_path, tokenizer, golden):
    if tokenizer == "world":
        pytest.importorskip("pyrwkv_tokenizer", reason="the World tokenizer is an extra")
    assert to_megatron(str(GOLDENS / "binidx.jsonl"), tokenizer, tmp_path / "own") == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["own.bin", "own.idx"]
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"own{ending}").read_bytes() == (GOLDENS / f"{golden}{ending}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_megatron_read_inverts_write(tmp_path, dtype):
    written = [np.array([*range(1, n), 0], dtype) for n in (3, 1, 90, 2)]
    assert megatron.write(tmp_path / "a", written, dtype) == 4
    tokens, starts = megatron.read(tmp_path / "a")
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype
    assert starts.tolist() == [0, 3, 4, 94]
    np.testing.assert_array_equal(tokens, np.concatenate(written))


def test_megatron_read_joins_sequences_of_a_document(tmp_path):
    megatron.write(tmp_path / "a", [np.array([5, 6]), np.array([7, 0]), np.array([8, 0]), np.array([9, 0])], "uint16")
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[26:34] = struct.pack("<Q", 4)  # documents of 2, 1 and 1 sequences
    (tmp_path / "a.idx").write_bytes(raw[: 34 + 4 * 12] + struct.pack("<4q", 0, 2, 3, 4))
    assert megatron.read(tmp_path / "a")[1].tolist() == [0, 4, 6]


def pair(folder, num_documents=100):
    rng = np.random.default_rng(0)
    texts = [np.append(rng.integers(1, 256, rng.integers(1, 30)), 0) for _ in range(num_documents)]
    megatron.write(folder / "a", texts, "uint16")
    return texts


@pytest.mark.parametrize("name", ["a", "a.bin", "a.idx"])
def test_prepare_reads_a_megatron_pair(tmp_path, name):
    texts = pair(tmp_path)
    corpus = prepare(str(tmp_path / name))
    assert (corpus.name, corpus.tokenizer, corpus.vocab_size) == ("a", "bytes", 256)
    found = [text for split in splits_of(corpus) for text in parts(split)]
    found[-1] = found[-1][:-1]  # the last separator starts no document
    assert found == [bytes(text[:-1].astype(np.uint8)) for text in texts]
    tokens = np.concatenate([split.tokens for split in splits_of(corpus)])
    np.testing.assert_array_equal(tokens, np.fromfile(tmp_path / "a.bin", np.uint16))
    assert isinstance(corpus.train.tokens, np.memmap) and 0.9 <= len(corpus.train.tokens) / len(tokens) < 0.92
    for split in splits_of(corpus):
        assert split.num_bytes is not None and split.starts[0] == 0
    assert (corpus.valid.tokens[corpus.valid.starts] == SEPARATOR).all()
    megatron.write(tmp_path / "b", texts[::-1], "uint16")
    first_two = np.concatenate(texts[:2])
    megatron.write(tmp_path / "d", [first_two[:1], first_two[1:], *texts[2:]], "uint16")
    for other in ("b", "d"):  # other tokens; the same tokens, other documents
        assert prepare(str(tmp_path / other)).sha256 != corpus.sha256
    for ending in (".bin", ".idx"):
        shutil.copy(tmp_path / f"a{ending}", tmp_path / f"c{ending}")
    assert prepare(str(tmp_path / "c")).sha256 == corpus.sha256


def test_prepare_starts_a_megatron_document_at_its_separator_if_it_has_one(tmp_path):
    texts = [np.append(np.arange(1, 9), 0 if i % 2 else 9) for i in range(60)]
    megatron.write(tmp_path / "a", texts, "uint16")
    assert prepare(str(tmp_path / "a")).train.starts.tolist() == [9 * i - (i > 0 and i % 2 == 0) for i in range(55)]


def patch(at, form, value):
    def damage(folder):
        raw = bytearray((folder / "a.idx").read_bytes())
        struct.pack_into(form, raw, at, value)
        (folder / "a.idx").write_bytes(raw)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (patch(0, "<q", 0), "a.idx is not the index of a Megatron token file"),
        (lambda folder: os.truncate(folder / "a.bin", 100), "a.bin has 100 bytes, expected "),
        (lambda folder: (folder / "a.bin").unlink(), "a.bin"),
        (patch(9, "<Q", 2), "a.idx: version 2, type 8: expected version 1 and a type of integers"),
        (patch(17, "<B", 6), "a.idx: version 1, type 6: expected version 1 and a type of integers"),
        (patch(34 + 4 * 99, "<i", -1), "a.idx is damaged: its sequences are not contiguous"),
        (patch(34 + 400 + 8, "<q", 3), "a.idx is damaged: its sequences are not contiguous"),
        (patch(34 + 1200 + 8, "<q", 70), "a.idx is damaged: its document index does not ascend from 0 to 100"),
    ],
)
def test_megatron_refuses_a_damaged_pair(tmp_path, damage, message):
    pair(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError)) as raised:
        prepare(str(tmp_path / "a.bin"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_megatron_read_refuses_or_survives_an_index_damaged_anywhere(tmp_path):
    pair(tmp_path, num_documents=10)
    content = (tmp_path / "a.idx").read_bytes()
    short = cuts(content, len(content) - 1)
    for damaged in [*short, *flips(content, 300)]:
        (tmp_path / "a.idx").write_bytes(damaged)
        try:
            tokens, starts = megatron.read(tmp_path / "a")
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "a")) and "\n" not in str(error)
        else:
            assert len(damaged) == len(content) and starts[0] == 0
            assert (np.diff(starts) > 0).all() and starts[-1] < len(tokens)


def test_megatron_refuses_tokens_outside_the_vocabulary(tmp_path):
    megatron.write(tmp_path / "a", [np.array([300, 0])] * 40, "uint16")
    with pytest.raises(ValueError, match=r"a\.bin holds token 300, outside the vocabulary of 256 of tokenizer bytes"):
        prepare(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="holds tokens, not text: name the tokenizer that made them"):
        prepare(str(tmp_path / "a"), "characters")


def test_megatron_write_leaves_the_old_pair_when_the_disk_is_full(tmp_path):
    pair(tmp_path)
    before = [(tmp_path / f"a{ending}").read_bytes() for ending in (".bin", ".idx")]

    def until_the_disk_is_full():
        yield np.arange(5)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        megatron.write(tmp_path / "a", until_the_disk_is_full(), "uint16")
    assert [(tmp_path / f"a{ending}").read_bytes() for ending in (".bin", ".idx")] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_megatron_write_refuses_a_document_whose_length_the_format_cannot_hold(tmp_path):
    long = np.broadcast_to(np.uint8(1), 1 << 31)
    with pytest.raises(ValueError, match="a document has 2,147,483,648 tokens, and the format holds fewer than 2"):
        megatron.write(tmp_path / "own", [long], "uint16")
    assert not list(tmp_path.iterdir())


def test_to_megatron_of_no_documents_writes_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match=r"^no documents to write to .*own$"):
        to_megatron(source, "bytes", tmp_path / "own")
    assert not list(tmp_path.glob("*own*"))
