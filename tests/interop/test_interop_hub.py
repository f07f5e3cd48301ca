"""Names on the Hugging Face hub, read from its local cache without a network."""

import socket
import time

import pytest
from huggingface_hub import constants
from small import drawn, make
from weights import assert_same_params, one_line, tiny

import rwkv_jax
from rwkv_jax import evaluate, interop
from rwkv_jax.data import hub as corpora_hub
from rwkv_jax.data import tokenizers
from rwkv_jax.generate import __main__ as generate_command
from rwkv_jax.interop import hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts files of a repository into an otherwise empty cache of huggingface_hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def put(repo, files):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        for name, path in files.items():
            target = folder / "snapshots" / ("0" * 40) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)

    return put


def test_load_reads_hub_names_from_the_local_cache(tmp_path, cache):
    model, params = tiny()
    rwkv_jax.save(tmp_path / "m", model, params)
    rwkv_jax.save(tmp_path / "m.pth", model, params)
    cache("org/folder", {path.name: path for path in (tmp_path / "m").iterdir()})
    cache("org/files", {"deep/m.pth": tmp_path / "m.pth"})
    assert_same_params(rwkv_jax.load("org/folder")[1], params)
    assert_same_params(rwkv_jax.load("org/files/deep/m.pth")[1], params)
    for name, message in (
        ("org/absent", "org/absent: no such file here, not in the hub's cache, and the hub was not reached"),
        ("org/files", "the hub has it without model.safetensors"),
    ):
        with one_line(message, OSError):
            rwkv_jax.load(name)


def test_commands_load_a_hub_model_with_its_tokenizer(tmp_path, cache, monkeypatch, capsys):
    """Computations are replaced: the tests of each command run them on local models."""
    rwkv_jax.save(tmp_path / "m", *drawn(make("rwkv4", vocab_size=256)))
    tokenizers.save(tokenizers.get_tokenizer("bytes"), tmp_path / "m")
    cache("org/folder", {path.name: path for path in (tmp_path / "m").iterdir()})
    (tmp_path / "text").write_text("some text")
    monkeypatch.setattr(generate_command, "stream", lambda model, params, prompt, tokenizer, **_: iter(tokenizer.name))
    for protocol in ("windows", "carried"):
        monkeypatch.setattr(evaluate, protocol, lambda model, params, tokens, *_: 0 * tokens)
    assert generate_command.main(["--model=org/folder", "--prompt=a", "--max_new_tokens=2"]) == 0
    assert evaluate.main(["--model=org/folder", f"--data={tmp_path / 'text'}", "--seq_len=4"]) == 0
    out, err = capsys.readouterr()
    assert "bytes" in out and "guessed" not in err


def test_load_reports_a_silent_hub_in_one_line_within_seconds(tmp_path, cache, monkeypatch):
    """The server accepts connections and never answers, as behind a firewall that drops packets; the library itself
    waits for minutes."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(corpora_hub, "_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("org/absent", "org/absent/m.pth"):
            began = time.monotonic()
            with one_line(f"{name}: no such file here, not in the hub's cache, and the hub was not reached", OSError):
                rwkv_jax.load(name)
            assert time.monotonic() - began < 10


def test_locate_never_asks_the_hub_for_local_names(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name: pytest.fail(f"looked up {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert interop.locate("runs/one") == interop.locate(tmp_path / "runs" / "one").relative_to(tmp_path)
    for name in ("runs/two", "elsewhere/m.pth", "m.pth", "./org/name", "/org/name", "a/b/c", "org/..", "~/a"):
        with one_line("no such file or folder; expected weights", FileNotFoundError):
            interop.locate(name)
