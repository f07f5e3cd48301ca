import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from rwkv_jax.corpora import SEPARATOR, cache_dir, prepare
from rwkv_jax.tokenizers import get_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 10], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    library.save(str(path))
    return str(path)


def prose(seed, lines=30):
    """Text with no line twice."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzäé€😀   "))
    return "\n".join("".join(row) for row in np.random.default_rng(seed).choice(letters, (lines, 40)))


def folder_of(path, texts):
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def documents(split):
    """{name: bytes} of a split of bytes, each without its separator."""
    ends = [*split.starts[1:], len(split.tokens)]
    assert (split.tokens[split.starts] == SEPARATOR).all()
    texts = [split.tokens[start + 1 : end].tobytes() for start, end in zip(split.starts, ends, strict=True)]
    assert sum(map(len, texts)) == split.num_bytes == len(split.tokens) - len(split.starts)
    return dict(zip(split.names, texts, strict=True))


def splits_of(corpus):
    return corpus.train, corpus.valid, corpus.test


def bytes_in_later_splits_found_in_train(corpus, probe_bytes=48, probes=300):
    train, rng = corpus.train.tokens.tobytes(), np.random.default_rng(0)
    found = 0
    for split in (corpus.valid, corpus.test):
        for at in rng.integers(0, len(split.tokens) - probe_bytes, probes):
            found += split.tokens[at : at + probe_bytes].tobytes() in train
    return found / (2 * probes)


def test_the_embedded_corpus():
    corpus = prepare()
    assert corpus.name == "stdlib-" + sys.version.split()[0]
    assert (corpus.tokenizer, corpus.vocab_size) == ("bytes", 256)
    names = [name for split in splits_of(corpus) for name in split.names]
    assert len(names) == len(set(names)) > 250
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    assert not [name for name in names if name.startswith(("test", "encodings/", "pydoc_data/", "idlelib/"))]
    assert not [name for name in names if "/test" in name]
    sizes = np.array([split.num_bytes for split in splits_of(corpus)])
    assert sizes.sum() > 6e6
    shares = sizes / sizes.sum()
    assert shares[0] > 0.8 and (shares[1:] > 0.02).all()
    for split in splits_of(corpus):
        for text in documents(split).values():
            text.decode()
    assert bytes_in_later_splits_found_in_train(corpus, probe_bytes=200) < 0.01
    assert prepare().sha256 == corpus.sha256


def test_tokens_are_a_read_only_memory_map():
    tokens = prepare().train.tokens
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_folder_is_split_by_file(tmp_path):
    texts = {f"{i % 7}/text {i}.txt": prose(i) for i in range(120)}
    corpus = prepare(folder_of(tmp_path / "books", texts))
    found = [documents(split) for split in splits_of(corpus)]
    assert sum(map(len, found)) == 120 and all(found)
    for split in found:
        assert list(split) == sorted(split)
        assert all(texts[name].encode() == text for name, text in split.items())
    assert bytes_in_later_splits_found_in_train(corpus) == 0
    assert corpus.name == "books"


def test_copies_and_near_copies_land_in_one_split(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(60)}
    texts |= {f"copy/{i}.txt": prose(i) for i in range(60)}
    texts |= {f"edited/{i}.txt": "a new first line\n" + prose(i)[:-20] for i in range(60)}
    texts |= {f"short/{i}.txt": "a\nb\n" for i in range(10)}
    corpus = prepare(folder_of(tmp_path / "books", texts))
    found = {name: text for split in splits_of(corpus) for name, text in documents(split).items()}
    assert len(found) == 61
    assert len([name for name in found if name.startswith("short/")]) == 1
    assert bytes_in_later_splits_found_in_train(corpus) == 0


def test_hidden_and_binary_files_are_left_out(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(3)}
    others = {
        ".hidden": "text",
        ".git/config": "text",
        "image.png": b"\x89PNG\x00\x01",
        "latin1.txt": "Käfer".encode("latin-1"),
        "zeros.bin": bytes(50),
        "empty.txt": "",
    }
    corpus = prepare(folder_of(tmp_path / "books", texts | others))
    assert {name for split in splits_of(corpus) for name in split.names} == set(texts)


def test_a_small_folder_is_cut_like_one_file(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(5)}
    corpus = prepare(folder_of(tmp_path / "books", texts))
    found = [documents(split) for split in splits_of(corpus)]
    assert [list(split) for split in found] == [["0.txt", "1.txt", "2.txt", "3.txt", "4.txt"], ["4.txt"], ["4.txt"]]
    whole = "".join(texts.values()).encode()
    assert b"".join(text for split in found for text in split.values()) == whole
    assert abs(corpus.train.num_bytes - 0.9 * len(whole)) <= 3
    for split in found:
        for text in split.values():
            text.decode()


def test_a_file_is_cut_at_90_and_95_percent(tmp_path):
    text = np.random.default_rng(0).integers(32, 127, 2000).astype(np.uint8).tobytes()
    (tmp_path / "text.txt").write_bytes(text)
    corpus = prepare(str(tmp_path / "text.txt"))
    assert [documents(split) for split in splits_of(corpus)] == [
        {"text.txt": part} for part in (text[:1800], text[1800:1900], text[1900:])
    ]


@pytest.mark.parametrize("prefix", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_no_character_is_cut_in_two(tmp_path, prefix, character):
    text = prefix + character * 50
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = [documents(split)["text.txt"] for split in splits_of(prepare(str(tmp_path / "text.txt")))]
    assert "".join(part.decode() for part in found) == text
    assert 0 <= len(text.encode()) * 90 // 100 - len(found[0]) <= 3


def test_any_bytes_will_do_for_bytes(tmp_path):
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    (tmp_path / "data.bin").write_bytes(text)
    splits = splits_of(prepare(str(tmp_path / "data.bin")))
    assert b"".join(split.tokens[1:].tobytes() for split in splits) == text
    assert [len(split.starts) for split in splits] == [1, 1, 1]


@pytest.mark.slow
def test_enwik8_is_cut_at_whole_megabytes_even_inside_a_character(tmp_path):
    (tmp_path / "enwik8").write_bytes(b"x" + "é".encode() * 49_999_999 + b"x")
    corpus = prepare(str(tmp_path / "enwik8"))
    assert [split.num_bytes for split in splits_of(corpus)] == [90_000_000, 5_000_000, 5_000_000]


def test_a_trained_tokenizer(tmp_path, bpe):
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


def test_a_second_call_reads_what_the_first_wrote(tmp_path):
    (tmp_path / "text.txt").write_text(prose(0))
    first = prepare(str(tmp_path / "text.txt"))
    written = os.stat(first.train.tokens.filename)
    again = prepare(str(tmp_path / "text.txt"))
    assert os.stat(again.train.tokens.filename).st_mtime_ns == written.st_mtime_ns
    assert os.stat(again.train.tokens.filename).st_ino == written.st_ino
    assert again.sha256 == first.sha256


def test_a_changed_file_or_tokenizer_is_noticed(tmp_path, bpe):
    path = tmp_path / "text.txt"
    path.write_text(prose(0))
    first = prepare(str(path))
    path.write_text(prose(0)[::-1])
    second = prepare(str(path))
    assert documents(second.train)["text.txt"] == path.read_bytes()[: second.train.num_bytes]
    assert second.sha256 != first.sha256

    own = tmp_path / "tokenizer.json"
    own.write_text(Path(bpe).read_text())
    with_bpe = prepare(str(path), str(own))
    own.write_text(Path(bpe).read_text().replace("<|endoftext|>", "<|end|>"))
    assert prepare(str(path), str(own)).sha256 != with_bpe.sha256


def test_the_hash_is_of_the_content(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(0))
    assert prepare(str(tmp_path / "a.txt")).sha256 == prepare(str(tmp_path / "b.txt")).sha256


def cut(path):
    os.truncate(path, 100)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_a_number(path):
    meta = json.loads(path.read_text())
    meta["record"]["splits"]["valid"]["num_bytes"] += 1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut, "train.bin"),
        (cut, "meta.json"),
        (Path.unlink, "train.bin"),
        (Path.unlink, "meta.json"),
        (flip_a_bit, "train.bin"),
        (flip_a_bit, "test.bin"),
        (flip_a_bit, "valid.starts"),
        (change_a_number, "meta.json"),
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_word(tmp_path, caplog, damage, name):
    (tmp_path / "text.txt").write_text(prose(0))
    first = prepare(str(tmp_path / "text.txt"))
    expected = [documents(split) for split in splits_of(first)]
    folder = Path(first.train.tokens.filename).parent
    del first
    damage(folder / name)
    again = prepare(str(tmp_path / "text.txt"))
    assert [documents(split) for split in splits_of(again)] == expected
    assert [record.message for record in caplog.records] == [f"{folder / name} is damaged: making it again"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("RWKV_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "rwkv_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "rwkv_jax"


def make_empty_folder(path):
    path.mkdir()


def make_binary_folder(path):
    folder_of(path, {"a.bin": b"\xff\xfe", "b.bin": bytes(10)})


def make_empty_file(path):
    path.touch()


def make_short_file(path):
    path.write_text("9 letters")


def make_nothing(path):
    pass


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
def test_mistakes(tmp_path, cache, make, error, line):
    make(tmp_path / "source")
    with pytest.raises(error) as raised:
        prepare(str(tmp_path / "source"))
    assert str(raised.value) == line.format(tmp_path / "source")
    assert not [path for path in cache.glob("*") if path.name != "lock"]


def test_an_unknown_name():
    with pytest.raises(
        FileNotFoundError, match=r"^no corpus enwik9: expected 'stdlib', a name such as enwik8, or a path"
    ):
        prepare("enwik9")


def test_bytes_that_are_not_utf8_need_the_byte_tokenizer(tmp_path, cache, bpe):
    (tmp_path / "data.bin").write_bytes(b"text \xff text" * 100)
    with pytest.raises(ValueError, match=r"data\.bin is not UTF-8, which tokenizer .*tokenizer\.json needs$"):
        prepare(str(tmp_path / "data.bin"), bpe)
    assert [path.name for path in cache.iterdir()] == ["lock"]


BUILD = """
import os, sys
from rwkv_jax.corpora import prepare
corpus = prepare(sys.argv[1], sys.argv[2])
print(corpus.sha256, os.stat(corpus.train.tokens.filename).st_ino)
"""


def start_build(source, tokenizer):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", BUILD, source, tokenizer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_two_processes_make_it_once(tmp_path, bpe):
    (tmp_path / "text.txt").write_text(prose(0, lines=30_000))
    builds = [start_build(str(tmp_path / "text.txt"), bpe) for _ in range(2)]
    outputs = [build.communicate() for build in builds]
    assert [build.returncode for build in builds] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert outputs[0][0].split()[0] == prepare(str(tmp_path / "text.txt"), bpe).sha256


def test_a_killed_build_leaves_nothing_that_counts(tmp_path, cache, bpe):
    source = tmp_path / "text.txt"
    source.write_text(prose(0, lines=60_000))
    build = start_build(str(source), bpe)
    while not any(tokens.stat().st_size for tokens in cache.glob("*.partial/train.bin")):
        assert build.poll() is None, build.communicate()
        time.sleep(0.001)
    build.kill()
    build.communicate()
    [leftover] = cache.glob("*.partial")
    assert (leftover / "train.bin").exists() and not (leftover / "meta.json").exists()

    # Whichever corpus is made next clears it away.
    (tmp_path / "other.txt").write_text(prose(1))
    prepare(str(tmp_path / "other.txt"))
    assert not list(cache.glob("*.partial"))

    corpus = prepare(str(source), bpe)
    assert sum(split.num_bytes for split in splits_of(corpus)) == source.stat().st_size
    ids = np.concatenate([split.tokens[1:] for split in splits_of(corpus)])
    assert get_tokenizer(bpe).decode(ids) == source.read_text()
