"""Sources: detected from their content and not their names, links included; files left out are counted."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from texts import documents, folder_of, parts, prose, splits_of, write_jsonl

from rwkv_jax.data import megatron, mixture, prepare
from rwkv_jax.data.__main__ import main

RECORDS = [{"body": f"text {i}", "q": f"{i}?"} for i in range(60)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
FIELDS = {"text": "{body}", "prompt": "q"}


def texts_of(corpus):
    return sorted(text for split in splits_of(corpus) for text in parts(split))


EXPECTED = sorted(f"{i}?text {i}".encode() for i in range(60))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("bb22", b"\n" + LINES),
        ("a.txt", b"\xef\xbb\xbf" + LINES),
        ("a.json", gzip.compress(LINES)),
        ("a.jsonl.gz", LINES),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a", lzma.compress(LINES)),
    ],
)
def test_prepare_detects_json_lines_from_their_content(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert texts_of(prepare(str(tmp_path / name), **FIELDS)) == EXPECTED
    with pytest.raises(ValueError, match=r":[12]: no field 'text', only 'body', 'q'$"):
        prepare(str(tmp_path / name))


@pytest.mark.parametrize("fields", [FIELDS, {"text": "body"}, {}])
def test_prepare_reads_json_lines_in_subfolders_and_leaves_out_a_readme(fields, tmp_path, capsys):
    of = lambda split: [{"text": f"{split} {i}"} | record for i, record in enumerate(RECORDS)]
    for name in ("train/0.jsonl", "devices/0.json", "test/dev.jsonl", "test/1.json"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "set" / name, of(name))
    (tmp_path / "set/README.md").write_text("About these texts\n" * 9)
    (tmp_path / "set/images.zip").write_bytes(b"PK\x03\x04" + bytes(99_999))
    corpus = prepare(str(tmp_path / "set"), **fields)
    assert [len(split.starts) for split in splits_of(corpus)] == [120, 60, 60]
    assert capsys.readouterr().err == f"{tmp_path / 'set'}: left out: 2 of 6 files (not JSON lines: 2)\n"
    if not fields:
        assert {text.split()[0] for text in parts(corpus.test)} == {b"test/1.json"}


def test_prepare_reads_json_lines_among_texts_as_text_unless_fields_are_named(tmp_path):
    folder = Path(folder_of(tmp_path / "set", {f"{i}.py": prose(i, lines=200) for i in range(30)}))
    write_jsonl(folder / "sample.jsonl", RECORDS)
    assert len([name for split in splits_of(prepare(str(folder))) for name in split.names]) == 31
    assert texts_of(prepare(str(folder), **FIELDS)) == EXPECTED


def save_tokens(path):
    with path.open("wb") as file:
        np.save(file, np.full(99, 7))


WITHOUT_FIELDS = {
    "stdlib": None,
    "enwik8": None,
    "{}/a.txt": lambda path: path.write_text(prose(0)),
    "{}/array.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "{}/one object.json": lambda path: path.write_text(json.dumps(RECORDS[0], indent=1)),
    "{}/a.npy": save_tokens,
    "{}/folder": lambda path: folder_of(path, {"a.txt": prose(0)}),
    "{}/a.txt:1,stdlib:2": lambda path: path.with_name("a.txt").write_text(prose(0)),
}


@pytest.mark.parametrize("source", WITHOUT_FIELDS)
@pytest.mark.parametrize("fields", [{"text": "body"}, {"prompt": "q"}])
def test_prepare_refuses_fields_for_a_source_without_json_lines(source, fields, tmp_path):
    path = Path(source.format(tmp_path))
    if WITHOUT_FIELDS[source]:
        WITHOUT_FIELDS[source](path)
    with pytest.raises(ValueError, match=r" holds no JSON lines \(one object a line\), to which text="):
        mixture.prepare(str(path), **fields)


def test_mixture_applies_fields_to_its_json_lines_alone(tmp_path):
    (tmp_path / "a.txt").write_text(prose(0))
    source = f"{tmp_path / 'a.txt'}:1,{write_jsonl(tmp_path / 'b.json', RECORDS)}:1"
    text, records = mixture.prepare(source, **FIELDS).parts
    assert text.train.mask is None and texts_of(records) == EXPECTED


def zipped(data):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", data)
        return file.getvalue()


def tarred(data):
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            about = tarfile.TarInfo("a.txt")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
        return file.getvalue()


PACKED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": zipped,
    "tar": tarred,
    "compress": lambda data: b"\x1f\x9d\x90" + data,
    "lzip": lambda data: b"LZIP\x01\x0c" + data,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "pdf": lambda data: b"%PDF-1.7\n" + data,
    "zstd": lambda data: b"\x28\xb5\x2f\xfd" + data,
    "parquet": lambda data: b"PAR1\x15\x04" + data + b"PAR1",
}


@pytest.mark.parametrize("ending", ["txt", "gz"])
def test_prepare_refuses_compressed_text_and_counts_it_in_a_folder(ending, tmp_path, capsys):
    texts = {f"{i}.txt": prose(i) for i in range(5)}
    packed = {f"more/{kind}.{ending}": pack(prose(9).encode() + b"\0\xff") for kind, pack in PACKED.items()}
    folder = folder_of(tmp_path / "set", texts | packed)
    for kind, name in zip(PACKED, packed, strict=True):
        with pytest.raises(ValueError, match=rf"{name} is {kind}, not text: "):
            prepare(f"{folder}/{name}")
    assert {name for split in splits_of(prepare(folder)) for name in split.names} == set(texts)
    counts = ", ".join(f"{kind}: 1" for kind in sorted(PACKED))
    assert capsys.readouterr().err == f"{folder}: left out: {len(packed)} of {5 + len(packed)} files ({counts})\n"


def test_prepare_refuses_json_lines_in_an_unsupported_compression(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(PACKED["zstd"](LINES))
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is zstd, .*: decompress it first$"):
        prepare(str(tmp_path / "a.jsonl.zst"), **FIELDS)


@pytest.mark.parametrize("text", ["BZh is not bzip2. ", "PAR1 is not parquet. ", "ustar"])
def test_prepare_reads_text_that_begins_like_an_archive(text, tmp_path):
    (tmp_path / "a.txt").write_text(text * 9)
    assert prepare(str(tmp_path / "a.txt")).train.tokens[1:4].tobytes() == text[:3].encode()


# ---- counts


def test_prepare_reports_files_left_out_of_a_folder_at_every_start(tmp_path, capsys):
    header = "".join(f"# line {i} of a licence that all files begin with\n" for i in range(40))
    texts = {f"{i:02}.txt": header + prose(i, lines=5) for i in range(4)}
    texts |= {f"latin {i}.txt": prose(i).replace("€", "").replace("😀", "").encode("cp1252") for i in range(10, 15)}
    folder = Path(folder_of(tmp_path / "set", texts | {"empty": "", ".hidden": "a", ".git/config": "b"}))
    folder_of(tmp_path / "other", {"a.txt": prose(99)})
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    reasons = "hidden: 2, linked folder, not followed: 1, neither file nor folder: 1, empty: 1, "
    reasons += "most lines in files before it: 3"
    line = f"{folder}: left out: 13 of 14 files ({reasons}, not UTF-8 text: 5)\n"
    for arguments in ([], [], ["--tokenizer=characters"], [f"--write={tmp_path / 'own'}"]):
        assert main([str(folder), *arguments]) == 0
        assert capsys.readouterr().err == line
    mixture.prepare(str(folder))  # the call that training makes
    assert capsys.readouterr().err == line
    (folder / "also empty").write_text("")  # the tokens need no rebuild
    prepare(str(folder))
    assert capsys.readouterr().err == line.replace("13 of 14", "14 of 15").replace("empty: 1", "empty: 2")


def test_prepare_reports_json_objects_without_text(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * (i % 7)} for i in range(70)])
    for tokenizer in ("bytes", "characters", "bytes"):
        prepare(source, tokenizer)
        assert capsys.readouterr().err == f"{source}: left out: 10 of 70 objects (without text: 10)\n"


def test_prepare_refuses_a_folder_whose_files_are_all_left_out(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/linked").symlink_to(tmp_path)
    with pytest.raises(
        ValueError, match=r"set is empty: .*; left out: 1 of 1 files \(linked folder, not followed: 1\)$"
    ):
        prepare(str(tmp_path / "set"))


# ---- links, in the layout of huggingface_hub's downloads


@pytest.fixture
def link(tmp_path):
    """A function that moves a file to ../../blobs/HASH, leaves a link in its place and returns the link's path."""
    (tmp_path / "blobs").mkdir()

    def moved(path):
        folder = tmp_path / "snapshots" / "1a2b"
        folder.mkdir(parents=True, exist_ok=True)
        blob = f"bb{len(list((tmp_path / 'blobs').iterdir()))}"
        path.rename(tmp_path / "blobs" / blob)
        (folder / path.name).symlink_to(Path("../../blobs") / blob)
        return folder / path.name

    return moved


def test_prepare_names_linked_tokens_and_json_lines_by_the_link(link, tmp_path):
    tokens = np.tile(np.array([7, 8, 9, 0], np.uint16), 30)
    np.save(tmp_path / "tokens.npy", tokens)
    corpus = prepare(str(link(tmp_path / "tokens.npy")))
    assert corpus.name == "tokens" and sum(len(split.tokens) for split in splits_of(corpus)) == 120

    megatron.write(tmp_path / "pair", np.split(tokens, 30), np.uint16)
    paths = [link(tmp_path / f"pair{ending}") for ending in (".bin", ".idx")]
    for path in (*paths, paths[0].with_suffix("")):
        corpus = prepare(str(path))
        assert corpus.name == "pair" and sum(len(split.tokens) for split in splits_of(corpus)) == 120

    for name, content in (("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES))):
        (tmp_path / name).write_bytes(content)
        path = link(tmp_path / name)
        corpus = prepare(str(path), **FIELDS)
        assert corpus.name == name and texts_of(corpus) == EXPECTED
    for path in tmp_path.glob("snapshots/*/*"):
        path.unlink()

    for split, name in enumerate(("train.jsonl", "validation.jsonl.gz", "test.jsonl")):
        link(Path(write_jsonl(tmp_path / name, [{"text": f"{split} {i}"} for i in range(9)])))
    folder = tmp_path / "snapshots" / "1a2b"
    (tmp_path / "my set").symlink_to(folder)
    for path in (folder, tmp_path / "my set"):
        corpus = prepare(str(path))
        assert corpus.name == path.name
        assert [{text[:1] for text in parts(split)} for split in splits_of(corpus)] == [{b"0"}, {b"1"}, {b"2"}]


def test_prepare_names_linked_texts_by_the_link(link, tmp_path, monkeypatch):
    texts = {f"{i}.txt": prose(i) for i in range(3)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        path = link(tmp_path / name)
    assert prepare(str(path)).name == "2.txt" and documents(prepare(str(path)).train).keys() == {"2.txt"}
    assert {name for split in splits_of(prepare(str(path.parent))) for name in split.names} == set(texts)
    monkeypatch.chdir(path.parent)
    assert prepare(".").name == "1a2b" and prepare("2.txt").name == "2.txt"
    (path.parent / "sub").mkdir()
    monkeypatch.chdir("sub")
    assert prepare("..").name == "1a2b"


def test_prepare_detects_an_array_of_tokens_from_its_content(tmp_path):
    save_tokens(tmp_path / "bb22")
    assert prepare(str(tmp_path / "bb22")).train.tokens.tolist() == [7] * 89
