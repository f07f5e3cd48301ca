"""Names on the Hugging Face hub, from its local cache: nothing here reaches a network."""

import pytest
from huggingface_hub import constants
from small import drawn, make
from weights import assert_same_params, one_line, tiny

import rwkv_jax
from rwkv_jax import evaluate, interop
from rwkv_jax.data import tokenizers
from rwkv_jax.generate import __main__ as generate_command
from rwkv_jax.interop import hub


def lay_out_cache(home, repo, files):
    """A cache of huggingface_hub that holds `files` of `repo`."""
    folder = home / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for name, path in files.items():
        target = folder / "snapshots" / ("0" * 40) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)


def test_hub_names_are_read_from_its_cache(tmp_path, monkeypatch):
    model, params = tiny()
    rwkv_jax.save(tmp_path / "m", model, params)
    rwkv_jax.save(tmp_path / "m.pth", model, params)
    lay_out_cache(tmp_path / "hub", "org/folder", {name.name: name for name in (tmp_path / "m").iterdir()})
    lay_out_cache(tmp_path / "hub", "org/files", {"deep/m.pth": tmp_path / "m.pth"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert_same_params(rwkv_jax.load("org/folder")[1], params)
    assert_same_params(rwkv_jax.load("org/files/deep/m.pth")[1], params)
    for name, message in (
        ("org/absent", "org/absent: no such file here, not in the hub's cache, and the hub was not reached"),
        ("org/files/absent.pth", "not in the hub's cache"),
        ("org/files", "the hub has it without model.safetensors"),
    ):
        with one_line(message, OSError):
            rwkv_jax.load(name)


def test_hub_model_comes_with_its_tokenizer_on_every_command_line(tmp_path, monkeypatch, capsys):
    """The commands are given what they would compute: their tests run them on models of this machine."""
    rwkv_jax.save(tmp_path / "m", *drawn(make("rwkv4", vocab_size=256)))
    tokenizers.save(tokenizers.get_tokenizer("bytes"), tmp_path / "m")
    lay_out_cache(tmp_path / "hub", "org/folder", {name.name: name for name in (tmp_path / "m").iterdir()})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "text").write_text("some text")
    seen = []

    def stream(model, params, prompt, tokenizer, **_):
        seen.append((model.vocab_size, prompt, tokenizer.name))
        return iter("ab")

    def nats(model, params, tokens, *_):
        seen.append((model.vocab_size, bytes(tokens[1:].tolist()).decode()))
        return 0 * tokens

    monkeypatch.setattr(generate_command, "stream", stream)
    for protocol in ("windows", "carried"):
        monkeypatch.setattr(evaluate, protocol, nats)
    assert generate_command.main(["--model=org/folder", "--prompt=a", "--max_new_tokens=2"]) == 0
    assert evaluate.main(["--model=org/folder", f"--data={tmp_path / 'text'}", "--seq_len=4"]) == 0
    assert seen == [(256, "a", "bytes"), (256, "some text"), (256, "some text")]
    assert "guessed" not in capsys.readouterr().err


def test_hub_is_not_asked_for_local_names(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name: pytest.fail(f"looked up {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert interop.locate("runs/one") == interop.locate(tmp_path / "runs" / "one").relative_to(tmp_path)
    for name in ("runs/two", "elsewhere/m.pth", "m.pth", "./org/name", "/org/name", "a/b/c", "org/..", "~/a"):
        with one_line("no such file or folder; expected weights", FileNotFoundError):
            interop.locate(name)
