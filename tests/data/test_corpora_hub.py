"""Datasets of the Hugging Face hub: its library reads them from local folders, without a network."""

import sys
import types
from pathlib import Path

import pytest
from texts import parts, splits_of, write_jsonl

from rwkv_jax.data import hub, prepare


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))  # its locks, too
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": f"t{i}", "q": f"Q{i}"} for i in range(60)])
    write_jsonl(tmp_path / "set" / "validation.jsonl", [{"text": f"v{i}", "q": f"Q{i}"} for i in range(5)])
    return str(tmp_path / "set")


@pytest.mark.live
def test_hub_splits_become_train_valid_and_test(folder):
    texts = sorted(b"t%d" % i for i in range(60))
    corpus = prepare(f"hf:{folder}")
    train, valid, test = map(parts, splits_of(corpus))
    assert corpus.name == "set" and valid == [b"v%d" % i for i in range(5)]
    assert sorted(train + test) == texts and 1 <= len(test) < 12
    alone = [parts(split) for split in splits_of(prepare(f"hf:{folder}:train"))]
    assert sorted(text for split in alone for text in split) == texts and all(alone)

    prompted = prepare(f"hf:{folder}", prompt="{q}? ").valid
    assert parts(prompted) == [b"Q%d? v%d" % (i, i) for i in range(5)]
    assert bytes(prompted.tokens[prompted.mask != 0]) == b"".join(b"\0v%d" % i for i in range(5))

    assert prepare(f"hf:{folder}").sha256 == corpus.sha256
    write_jsonl(Path(folder) / "validation.jsonl", [{"text": "new", "q": ""}])
    assert parts(prepare(f"hf:{folder}").valid) == [b"new"], "a changed folder is noticed"


@pytest.mark.live
def test_hub_error_names_what_is_missing(folder):
    with pytest.raises(ValueError, match=f"^corpus hf:{folder}:nothing: Bad split: nothing"):
        prepare(f"hf:{folder}:nothing")
    with pytest.raises(ValueError, match=f"^corpus hf:{folder}, row 0 of train: no field 'body', only 'text', 'q'$"):
        prepare(f"hf:{folder}", text="body")


def test_hub_folder_may_hold_colons_and_at_but_no_pattern(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_load", lambda spec, *arguments: asked.append(arguments) or {"train": []})
    for name in ("me@home", "a:b", "[g]", "*"):
        (tmp_path / name).mkdir()
    for name in ("me@home", "a:b"):
        assert list(hub.source(f"hf:{tmp_path / name}:train", "text", "").documents()) == []
        assert asked.pop() == (str(tmp_path / name), None, "train", None)
    for name in ("[g]", "*"):  # given "*", the library would read every folder beside it
        with pytest.raises(ValueError, match=r": \*, \?, \[ and \] in .* are a pattern to the library: rename it$"):
            hub.source(f"hf:{tmp_path / name}", "text", "")


@pytest.mark.parametrize(("error", "expected"), [(ConnectionError, OSError), (RuntimeError, ValueError)])
def test_hub_error_of_the_library_is_one_line(monkeypatch, error, expected):
    def load_dataset(*args, **kwargs):
        raise error("no answer")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub, "is_reached", lambda: True)
    with pytest.raises(expected, match=r"^corpus hf:a/b: no answer$"):
        prepare("hf:a/b")
    monkeypatch.setattr(hub, "is_reached", lambda: False)
    with pytest.raises(OSError, match=r"^corpus hf:a/b: the hub was not reached$"):
        prepare("hf:a/b")


@pytest.mark.parametrize("spec", ["hf:", "hf:a:", "hf:a:b:c:d"])
def test_hub_refuses_other_forms(spec):
    with pytest.raises(ValueError, match="expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        prepare(spec)


def test_hub_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^corpus hf:a/b needs another package: pip install datasets$"):
        prepare("hf:a/b")


def test_hub_asks_the_library_for_name_config_split_and_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_load", lambda *arguments: asked.append(arguments) or {"train": []})
    for spec in ("hf:a/b", "hf:a/b:train", "hf:a/b@v1:small:train"):
        assert list(hub.source(spec, "text", "").documents()) == []
    assert asked == [
        ("hf:a/b", "a/b", None, None, None),
        ("hf:a/b:train", "a/b", None, "train", None),
        ("hf:a/b@v1:small:train", "a/b", "small", "train", "v1"),
    ]
