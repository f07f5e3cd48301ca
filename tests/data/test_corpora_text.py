"""Text files, folders and Python's standard library: files that are read, and their splits."""

import sys

import numpy as np
import pytest
from texts import documents, folder_of, prose, splits_of

from rwkv_jax.data import prepare
from rwkv_jax.data import text as sources


def bytes_in_later_splits_found_in_train(corpus, probe_bytes=48, probes=100):
    train, rng = corpus.train.tokens.tobytes(), np.random.default_rng(0)
    found = 0
    for split in (corpus.valid, corpus.test):
        for at in rng.integers(0, len(split.tokens) - probe_bytes, probes):
            found += split.tokens[at : at + probe_bytes].tobytes() in train
    return found / (2 * probes)


def test_stdlib_corpus_has_whole_modules_in_three_splits(capsys):
    corpus = prepare()
    assert capsys.readouterr().err == ""  # nothing is left out
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


def test_prepare_splits_a_folder_by_file(tmp_path):
    texts = {f"{i % 7}/text {i}.txt": prose(i) for i in range(120)}
    corpus = prepare(folder_of(tmp_path / "books", texts))
    found = [documents(split) for split in splits_of(corpus)]
    assert sum(map(len, found)) == 120 and all(found)
    for split in found:
        assert list(split) == sorted(split)
        assert all(texts[name].encode() == text for name, text in split.items())
    assert bytes_in_later_splits_found_in_train(corpus) == 0
    assert corpus.name == "books"


def test_prepare_leaves_out_copies_hidden_and_binary_files(tmp_path):
    texts = {f"{i}.txt": prose(i) for i in range(60)}
    others = {f"copy/{i}.txt": prose(i) for i in range(60)}
    others |= {f"edited/{i}.txt": "a new first line\n" + prose(i)[:-20] for i in range(60)}
    others |= {f"short/{i}.txt": "a\nb\n" for i in range(10)}
    others |= {".hidden": prose(61), ".git/config": prose(62), "image.png": b"\x89PNG\x00\x01"}
    others |= {"latin1.txt": "Käfer".encode("latin-1"), "zeros.bin": bytes(50), "empty.txt": ""}
    corpus = prepare(folder_of(tmp_path / "books", texts | others))
    found = {name for split in splits_of(corpus) for name in split.names}
    assert found == {*texts, "short/0.txt"}
    assert bytes_in_later_splits_found_in_train(corpus) == 0


def test_prepare_keeps_the_splits_of_a_folder(tmp_path, capsys):
    texts = {f"{split}/{i}.txt": prose(i, 5) for i, split in enumerate(("test", "train", "train", "valid"))}
    corpus = prepare(folder_of(tmp_path / "books", texts | {"README": prose(9), "tests/a.txt": prose(10)}))
    found = [documents(split) for split in splits_of(corpus)]
    assert [list(split) for split in found] == [["train/1.txt", "train/2.txt"], ["valid/3.txt"], ["test/0.txt"]]
    assert all(texts[name].encode() == text for split in found for name, text in split.items())
    assert "left out: 2 of 6 files (beside the subfolders of splits: 2)" in capsys.readouterr().err

    texts = {f"{split}/{i}.txt": prose(i, 5) for i in range(40) for split in ("train", "VAL")[: 1 + (i > 30)]}
    renamed = {name: text if "train" in name else text[::-1] for name, text in texts.items()}
    corpus = prepare(folder_of(tmp_path / "without test", renamed))
    assert set(corpus.valid.names) == {name for name in texts if "VAL" in name}
    assert 0 < len(corpus.test.names) < 10 and all(name.startswith("train/") for name in corpus.test.names)

    corpus = prepare(folder_of(tmp_path / "code", {f"{name}/{i}.py": prose(i) for i in range(9) for name in ["test"]}))
    assert corpus.train.names[0] == "test/0.py"  # without a train folder, test is a folder like any other
    copies = {f"{split}/a.txt": prose(1) for split in ("train", "valid", "test")}
    with pytest.raises(ValueError, match=r"too few for train, valid and test; left out: 2 of 3 files .most lines"):
        prepare(folder_of(tmp_path / "copies", copies))


def test_prepare_keeps_new_files_when_most_hashes_of_lines_have_been_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SEEN_BYTES", 2**10)  # 8,192 bits, for the hashes of 8,000 lines
    texts = {f"{i:02}.txt": prose(i, lines=200) for i in range(40)} | {"copy.txt": prose(7, lines=200)}
    corpus = prepare(folder_of(tmp_path / "books", texts))
    found = {name for split in splits_of(corpus) for name in split.names}
    assert found == texts.keys() - {"copy.txt"}


def test_prepare_cuts_a_small_folder_like_one_file(tmp_path):
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


def test_prepare_cuts_a_file_at_90_and_95_percent_between_characters(tmp_path):
    for prefix in ("", "a", "ab", "abc"):
        for character in "aé€😀":
            text = prefix + character * 50
            (tmp_path / "text.txt").write_text(text, encoding="utf-8")
            found = [documents(split)["text.txt"] for split in splits_of(prepare(str(tmp_path / "text.txt")))]
            assert "".join(part.decode() for part in found) == text
            for percent, end in ((90, len(found[0])), (95, len(found[0] + found[1]))):
                assert 0 <= len(text.encode()) * percent // 100 - end < len(character.encode())


@pytest.mark.slow
def test_prepare_cuts_enwik8_at_whole_megabytes_even_inside_a_character(tmp_path):
    (tmp_path / "enwik8").write_bytes(b"x" + "é".encode() * 49_999_999 + b"x")
    corpus = prepare(str(tmp_path / "enwik8"))
    assert [split.num_bytes for split in splits_of(corpus)] == [90_000_000, 5_000_000, 5_000_000]
