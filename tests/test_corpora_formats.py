"""JSONL with prompts, Megatron pairs and .npy files."""

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax import data
from rwkv_jax.corpora import SEPARATOR, megatron, prepare, to_megatron
from rwkv_jax.tokenizers import get_tokenizer

GOLDENS = Path(__file__).with_name("goldens")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def splits_of(corpus):
    return corpus.train, corpus.valid, corpus.test


def documents(split):
    """Bytes of each document of a split of bytes, without its separator."""
    parts = np.split(split.tokens.astype(np.uint8), split.starts[1:])
    return [bytes(part[1:] if part[0] == SEPARATOR else part) for part in parts]


def write_jsonl(path, records):
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


# JSONL


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_every_line_is_a_document(tmp_path, name):
    texts = [f"text {i} é" for i in range(300)]
    records = [{"text": text, "id": i} for i, text in enumerate(texts)] + [{"text": ""}, {"text": texts[7]}]
    corpus = prepare(write_jsonl(tmp_path / name, records))
    found = [documents(split) for split in splits_of(corpus)]
    assert sorted(text.decode() for split in found for text in split) == sorted([*texts, texts[7]])
    assert [split.num_bytes for split in splits_of(corpus)] == [sum(map(len, split)) for split in found]
    assert 5 < len(found[1]) < 30 and 5 < len(found[2]) < 30
    assert [split.count(texts[7].encode()) for split in found] in ([2, 0, 0], [0, 2, 0], [0, 0, 2])
    assert corpus.train.mask is None and corpus.train.names == ()


def test_three_lines_make_three_splits(tmp_path):
    corpus = prepare(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "a", "b", "c")]))
    assert [documents(split) for split in splits_of(corpus)] == [[b"a", b"a"], [b"b"], [b"c"]]


def test_files_of_a_folder_are_splits_by_name(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", [{"text": f"t{i}"} for i in range(50)])
    write_jsonl(folder / "train-1.jsonl.gz", [{"text": f"u{i}"} for i in range(50)])
    write_jsonl(folder / "validation.jsonl", [{"text": f"v{i}"} for i in range(5)])
    train, valid, test = (documents(split) for split in splits_of(prepare(str(folder))))
    assert valid == [b"v0", b"v1", b"v2", b"v3", b"v4"]
    assert len(train) + len(test) == 100 and 1 <= len(test) < 15
    assert {text[:1] for text in train} == {b"t", b"u"}


def test_what_the_prompt_holds_is_not_to_be_predicted(tmp_path):
    records = [{"question": f"Q{i}?", "answer": i, "more": None} for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    corpus = prepare(source, text=" {answer}", prompt="Question: {question}\n\nAnswer:")
    seen = 0
    for split in splits_of(corpus):
        assert split.mask.dtype == np.uint8 and len(split.mask) == len(split.tokens)
        for tokens, mask in zip(*(np.split(x, split.starts[1:]) for x in (split.tokens, split.mask)), strict=True):
            number = int(bytes(tokens).split()[-1])
            prompt, text = f"Question: Q{number}?\n\nAnswer:", f" {number}"
            assert bytes(tokens) == b"\0" + (prompt + text).encode()
            assert mask.tolist() == [1] + [0] * len(prompt) + [1] * len(text)
            seen += 1
    assert seen == 60
    assert corpus.sha256 != prepare(source, text="question").sha256

    batch = data.dataset(corpus.train, seq_len=40, batch_size=3, seed=0)[0]
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        predicted = bytes(tokens[1:][mask].astype(np.uint8))
        assert set(predicted) <= set(b"\0 0123456789") and predicted


def test_no_token_reaches_from_the_prompt_into_the_text(tmp_path):
    bpe = str(GOLDENS / "binidx_tokenizer.json")
    records = [{"a": "the sta", "b": "te of the text"} for _ in range(3)]
    records = [record | {"b": record["b"] + str(i)} for i, record in enumerate(records)]
    tokenizer = get_tokenizer(bpe)
    assert tokenizer.encode("the state") != tokenizer.encode("the sta") + tokenizer.encode("te")
    split = prepare(write_jsonl(tmp_path / "a.jsonl", records), bpe, "b", "a").train
    prompt, text = tokenizer.encode("the sta"), tokenizer.encode("te of the text0")
    assert split.tokens[: 1 + len(prompt) + len(text)].tolist() == [0, *prompt, *text]


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (b'{"text": "a"', {}, "not JSON: Expecting ',' delimiter at column 13"),
        (b"[1]", {}, "expected an object, found list"),
        (b'{"body": "a", "id": 1}', {}, "no field 'text', only 'body', 'id'"),
        (b'{"text": null}', {}, "field 'text' is NoneType, expected text or a number"),
        (b'{"text": "a"}', {"prompt": "Q: {q}"}, "no field 'q', only 'text'"),
        (b'{"text": "\xff"}', {}, "not UTF-8: invalid start byte"),
        (b'{"text": "\\ud800"}', {}, "not UTF-8: surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(tmp_path, cache, line, fields, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "q": "?"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as raised:
        prepare(str(tmp_path / "a.jsonl"), **fields)
    assert str(raised.value) == f"{tmp_path / 'a.jsonl'}:3: {message}"
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a!r}", "{a:>3}"])
def test_a_bad_template(tmp_path, template):
    source = write_jsonl(tmp_path / "a.jsonl", [{"a": "b"}] * 3)
    with pytest.raises(ValueError, match=r"^template '"):
        prepare(source, text=template)


def test_a_gzip_cut_short(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, [{"text": str(i)} for i in range(9999)])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged after line \d+: Compressed file ended before"):
        prepare(str(path))


def test_too_few_documents(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": ""}])
    with pytest.raises(ValueError, match=r"a\.jsonl holds 2 documents with text: too few for train, valid and test"):
        prepare(source)


# Megatron


def test_the_released_converter_writes_the_same_bytes(tmp_path):
    assert to_megatron(str(GOLDENS / "binidx.jsonl"), str(GOLDENS / "binidx_tokenizer.json"), tmp_path / "own") == 5
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"own{ending}").read_bytes() == (GOLDENS / f"binidx{ending}").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_the_released_converter_of_world_writes_the_same_bytes(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer", reason="the World tokenizer is an extra")
    to_megatron(str(GOLDENS / "binidx.jsonl"), "world", tmp_path / "own")
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"own{ending}").read_bytes() == (GOLDENS / f"binidx_world{ending}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_what_is_written_is_read(tmp_path, dtype):
    written = [np.array([*range(1, n), 0], dtype) for n in (3, 1, 90, 2)]
    assert megatron.write(tmp_path / "a", written, dtype) == 4
    tokens, starts = megatron.read(tmp_path / "a")
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype
    assert starts.tolist() == [0, 3, 4, 94]
    np.testing.assert_array_equal(tokens, np.concatenate(written))


def test_sequences_of_a_document_belong_together(tmp_path):
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
def test_a_megatron_pair_is_a_corpus(tmp_path, name):
    texts = pair(tmp_path)
    corpus = prepare(str(tmp_path / name))
    assert (corpus.name, corpus.tokenizer, corpus.vocab_size) == ("a", "bytes", 256)
    found = [text for split in splits_of(corpus) for text in documents(split)]
    found[-1] = found[-1][:-1]  # what ends the last document begins none
    assert found == [bytes(text[:-1].astype(np.uint8)) for text in texts]
    tokens = np.concatenate([split.tokens for split in splits_of(corpus)])
    np.testing.assert_array_equal(tokens, np.fromfile(tmp_path / "a.bin", np.uint16))
    assert isinstance(corpus.train.tokens, np.memmap) and 0.9 <= len(corpus.train.tokens) / len(tokens) < 0.92
    for split in splits_of(corpus):
        assert split.num_bytes is not None and split.starts[0] == 0
    assert (corpus.valid.tokens[corpus.valid.starts] == SEPARATOR).all()
    assert prepare(str(tmp_path / name)).sha256 == corpus.sha256


def test_another_order_of_documents_is_another_corpus(tmp_path):
    texts = pair(tmp_path)
    first = prepare(str(tmp_path / "a"))
    megatron.write(tmp_path / "b", texts[::-1], "uint16")
    assert prepare(str(tmp_path / "b")).sha256 != first.sha256
    for ending in (".bin", ".idx"):
        shutil.copy(tmp_path / f"a{ending}", tmp_path / f"c{ending}")
    assert prepare(str(tmp_path / "c")).sha256 == first.sha256


def cut_index(folder):
    os.truncate(folder / "a.idx", 200)


def cut_header(folder):
    os.truncate(folder / "a.idx", 20)


def cut_tokens(folder):
    os.truncate(folder / "a.bin", 100)


def lose_tokens(folder):
    (folder / "a.bin").unlink()


def other_index(folder):
    (folder / "a.idx").write_bytes(b"TNTIDX\0\0" + bytes(100))


def patch(at, form, value):
    def damage(folder):
        raw = bytearray((folder / "a.idx").read_bytes())
        struct.pack_into(form, raw, at, value)
        (folder / "a.idx").write_bytes(raw)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_index, "a.idx has 200 bytes, expected 2042 for its 100 sequences"),
        (cut_header, "a.idx is not the index of a Megatron token file"),
        (other_index, "a.idx is not the index of a Megatron token file"),
        (cut_tokens, "a.bin has 100 bytes, expected "),
        (lose_tokens, "a.bin"),
        (patch(9, "<Q", 2), "a.idx: version 2, type 8: expected version 1 and a type of integers"),
        (patch(17, "<B", 6), "a.idx: version 1, type 6: expected version 1 and a type of integers"),
        (patch(34, "<i", -1), "a.idx is damaged: its sequences do not lie one after another"),
        (patch(34 + 400 + 8, "<q", 3), "a.idx is damaged: its sequences do not lie one after another"),
        (patch(34 + 1200 + 8, "<q", 70), "a.idx is damaged: its document index does not lead from 0 to 100"),
    ],
)
def test_a_pair_that_does_not_fit(tmp_path, damage, message):
    pair(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError)) as raised:
        prepare(str(tmp_path / "a.bin"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_tokens_outside_the_vocabulary(tmp_path):
    megatron.write(tmp_path / "a", [np.array([300, 0])] * 40, "uint16")
    with pytest.raises(ValueError, match=r"a\.bin holds token 300, outside the vocabulary of 256 of tokenizer bytes"):
        prepare(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="holds tokens, not text: name the tokenizer that made them"):
        prepare(str(tmp_path / "a"), "characters")


def test_a_disk_that_fills_up_leaves_no_half_pair(tmp_path):
    pair(tmp_path)
    before = [(tmp_path / f"a{ending}").read_bytes() for ending in (".bin", ".idx")]

    def until_the_disk_is_full():
        yield np.arange(5)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        megatron.write(tmp_path / "a", until_the_disk_is_full(), "uint16")
    assert [(tmp_path / f"a{ending}").read_bytes() for ending in (".bin", ".idx")] == before
    assert not list(tmp_path.glob("*.partial"))


# .npy


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">u2"])
def test_an_array_of_tokens(tmp_path, dtype):
    tokens = np.tile(np.array([7, 8, 9, 10, 0]), 60).astype(dtype)
    np.save(tmp_path / "a.npy", tokens)
    corpus = prepare(str(tmp_path / "a.npy"))
    np.testing.assert_array_equal(np.concatenate([split.tokens for split in splits_of(corpus)]), tokens)
    assert isinstance(corpus.train.tokens, np.memmap)
    assert corpus.train.starts.tolist() == [0, *range(4, 270, 5)]
    assert corpus.valid.starts.tolist() == [0, 5, 10] and corpus.valid.tokens[0] == SEPARATOR


def test_an_array_without_documents_is_cut_by_position(tmp_path):
    np.save(tmp_path / "a.npy", np.full(200, 7, np.uint16))
    corpus = prepare(str(tmp_path / "a.npy"))
    assert [len(split.tokens) for split in splits_of(corpus)] == [180, 10, 10]
    assert [split.starts.tolist() for split in splits_of(corpus)] == [[0], [0], [0]]


def make_cut(path):
    np.save(path, np.arange(999))
    os.truncate(path, 700)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_cut, "a.npy is damaged or not a .npy file"),
        (lambda path: path.write_bytes(b"text"), "a.npy is damaged or not a .npy file"),
        (lambda path: path.touch(), "a.npy is damaged or not a .npy file"),
        (lambda path: np.save(path, np.array(["a"], object)), "a.npy is damaged or not a .npy file"),
        (lambda path: np.save(path, np.ones(9)), "a.npy holds float64 [9], expected integers of one dimension"),
        (lambda path: np.save(path, np.ones((3, 3), int)), "a.npy holds int64 [3, 3], expected integers of one"),
        (lambda path: np.save(path, np.full(99, -1)), "a.npy holds token -1, outside the vocabulary of 256"),
        (lambda path: np.save(path, np.ones(2, int)), "a.npy holds 2 tokens: too few for train, valid and test"),
        (lambda path: None, "No such file or directory"),
    ],
)
def test_an_array_that_holds_no_tokens(tmp_path, make, message):
    make(tmp_path / "a.npy")
    with pytest.raises((ValueError, OSError)) as raised:
        prepare(str(tmp_path / "a.npy"))
    assert message in str(raised.value) and "\n" not in str(raised.value)
