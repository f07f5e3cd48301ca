"""Datasets of the Hugging Face hub, read by its library from folders of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from texts import write_jsonl

from rwkv_jax.corpora import hub, prepare

PROGRAM = """
import json, sys
import numpy as np
from rwkv_jax.corpora import prepare

for line in sys.stdin:
    source, fields = json.loads(line)
    try:
        corpus = prepare(source, **fields)
    except (ValueError, OSError) as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        continue
    texts = [[bytes(part[1:]).decode() for part in np.split(s.tokens, s.starts[1:])] for s in corpus[4:]]
    predicted = [None if s.mask is None else bytes(s.tokens[s.mask != 0]).decode() for s in corpus[4:]]
    print(json.dumps([corpus.name, corpus.sha256, texts, predicted]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `prepare` returns or raises in a process of its own, since the library reads its settings on import."""
    home = tmp_path_factory.mktemp("hub")
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RWKV_JAX_CACHE": str(home / "cache"),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as process:

        def run(source, **fields):
            print(json.dumps([source, fields]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline() or json.dumps(process.stderr.read()))

        yield run
        process.stdin.close()
        assert process.wait(100) == 0, process.stderr.read()


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": f"t{i}", "q": f"Q{i}"} for i in range(60)])
    write_jsonl(tmp_path / "set" / "validation.jsonl", [{"text": f"v{i}", "q": f"Q{i}"} for i in range(5)])
    return str(tmp_path / "set")


@pytest.mark.live
def test_hub_splits_become_ours(run, folder):
    name, sha256, (train, valid, test), _ = run(f"hf:{folder}")
    assert name == "set" and valid == [f"v{i}" for i in range(5)]
    assert sorted(train + test) == sorted(f"t{i}" for i in range(60)) and 1 <= len(test) < 12
    assert run(f"hf:{folder}")[1] == sha256


@pytest.mark.live
def test_hub_single_split_is_split(run, folder):
    _, _, texts, _ = run(f"hf:{folder}:train")
    assert sorted(text for split in texts for text in split) == sorted(f"t{i}" for i in range(60)) and all(texts)


@pytest.mark.live
def test_hub_notices_a_changed_folder(run, folder):
    first = run(f"hf:{folder}")[1]
    write_jsonl(Path(folder) / "validation.jsonl", [{"text": "new", "q": ""}])
    _, second, texts, _ = run(f"hf:{folder}")
    assert second != first and texts[1] == ["new"]


@pytest.mark.live
def test_hub_prompt_is_masked(run, folder):
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
def test_hub_errors_are_one_line(run, folder, form, fields, line):
    error = run(form.format(folder), **fields)
    assert error.count("\n") == 0
    assert error.startswith((line.format(folder), line.replace("OSError", "ConnectionError")))


@pytest.mark.parametrize("spec", ["hf:", "hf:a:", "hf:a:b:c:d", "hf:@main"])
def test_hub_refuses_other_forms(spec):
    with pytest.raises(ValueError, match="expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        prepare(spec)


def test_hub_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^corpus hf:a/b needs another package: pip install datasets$"):
        prepare("hf:a/b")


def test_hub_asks_the_library_for_name_config_split_and_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_load", lambda *arguments: asked.append(arguments) or {"train": [{"text": "a"}] * 0})
    for spec in ("hf:a/b", "hf:a/b:train", "hf:a/b@v1:small:train"):
        assert list(hub.source(spec, "text", "").documents()) == []
    assert asked == [
        ("hf:a/b", "a/b", None, None, None),
        ("hf:a/b:train", "a/b", None, "train", None),
        ("hf:a/b@v1:small:train", "a/b", "small", "train", "v1"),
    ]
