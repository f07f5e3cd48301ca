"""Datasets of the Hugging Face hub, read by its library from folders of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax.corpora import hub, prepare

PROGRAM = """
import json, sys
import numpy as np
from rwkv_jax.corpora import prepare
source, fields = sys.argv[1], json.loads(sys.argv[2])
try:
    corpus = prepare(source, **fields)
except (ValueError, OSError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
texts = [[bytes(part[1:]).decode() for part in np.split(s.tokens, s.starts[1:])] for s in corpus[4:]]
predicted = [None if s.mask is None else bytes(s.tokens[s.mask != 0]).decode() for s in corpus[4:]]
print(json.dumps([corpus.name, corpus.sha256, texts, predicted]))
"""


@pytest.fixture
def run(tmp_path):
    """The library reads its settings when it is imported, so each corpus has a process of its own."""

    def run(source, **fields):
        env = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RWKV_JAX_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-W", "error", "-c", PROGRAM, source, json.dumps(fields)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else json.loads(done.stdout)

    return run


def write_jsonl(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": f"t{i}", "q": f"Q{i}"} for i in range(60)])
    write_jsonl(tmp_path / "set" / "validation.jsonl", [{"text": f"v{i}", "q": f"Q{i}"} for i in range(5)])
    return str(tmp_path / "set")


@pytest.mark.live
def test_splits_of_a_dataset_are_ours(run, folder):
    name, sha256, (train, valid, test), _ = run(f"hf:{folder}")
    assert name == "set" and valid == [f"v{i}" for i in range(5)]
    assert sorted(train + test) == sorted(f"t{i}" for i in range(60)) and 1 <= len(test) < 12
    assert run(f"hf:{folder}")[1] == sha256


@pytest.mark.live
def test_one_split_is_split(run, folder):
    _, _, texts, _ = run(f"hf:{folder}:train")
    assert sorted(text for split in texts for text in split) == sorted(f"t{i}" for i in range(60)) and all(texts)


@pytest.mark.live
def test_a_changed_folder_is_noticed(run, folder):
    first = run(f"hf:{folder}")[1]
    write_jsonl(Path(folder) / "validation.jsonl", [{"text": "new", "q": ""}])
    _, second, texts, _ = run(f"hf:{folder}")
    assert second != first and texts[1] == ["new"]


@pytest.mark.live
def test_prompts(run, folder):
    _, _, texts, predicted = run(f"hf:{folder}", prompt="{q}? ")
    assert texts[1] == [f"Q{i}? v{i}" for i in range(5)]
    assert predicted[1] == "".join(f"\0v{i}" for i in range(5))


@pytest.mark.live
@pytest.mark.parametrize(
    ("form", "fields", "line"),
    [
        ("hf:{}:nothing", {}, "ValueError: corpus hf:{}:nothing: Bad split: nothing"),
        ("hf:{}", {"text": "body"}, "ValueError: corpus hf:{}, row 0 of train: no field 'body', only 'text', 'q'"),
        ("hf:nobody/nothing", {}, "OSError: corpus hf:nobody/nothing: Couldn't reach 'nobody/nothing' on the Hub"),
    ],
)
def test_mistakes_of_the_library_are_one_line(run, folder, form, fields, line):
    error = run(form.format(folder), **fields).splitlines()[-1]
    assert error.startswith((line.format(folder), line.replace("OSError", "ConnectionError")))


@pytest.mark.parametrize("spec", ["hf:", "hf:a:", "hf:a:b:c:d", "hf:@main"])
def test_another_form(spec):
    with pytest.raises(ValueError, match="expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        prepare(spec)


def test_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^corpus hf:a/b needs another package: pip install datasets$"):
        prepare("hf:a/b")


def test_what_is_asked_of_the_library(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_load", lambda *arguments: asked.append(arguments) or {"train": [{"text": "a"}] * 0})
    for spec in ("hf:a/b", "hf:a/b:train", "hf:a/b@v1:small:train"):
        assert list(hub.source(spec, "text", "").documents()) == []
    assert asked == [
        ("hf:a/b", "a/b", None, None, None),
        ("hf:a/b:train", "a/b", None, "train", None),
        ("hf:a/b@v1:small:train", "a/b", "small", "train", "v1"),
    ]
