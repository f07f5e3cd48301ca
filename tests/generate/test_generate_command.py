"""`python -m rwkv_jax.generate`."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from generating import FIELDS, NEARLY_GREEDY, case, cycling, filled, unstacked

import rwkv_jax
from rwkv_jax import RWKVForCausalLM, checkpoint
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.generate import load_context, save_context, stream
from rwkv_jax.generate.__main__ import main

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoints", 3, {"params": case("rwkv4")[1]})
    config = {"model": {"name": "rwkv4", "num_layers": 1} | FIELDS, "tokenizer": "bytes", "seq_len": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def continued(capsys, workdir, *arguments):
    assert main([f"--model={workdir}", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("\n")
    return out[:-1]


def test_generate_command_prints_the_text_of_stream(workdir, capsys, tmp_path, monkeypatch):
    """The prompt comes from the command line, a file or standard input; the text ends at the first of several stop
    strings."""
    settings = {"max_new_tokens": 40, "temperature": 2.0, "seed": 4}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    expected = "".join(stream(*unstacked("rwkv4"), "日本\n", BYTES, **settings))
    assert continued(capsys, workdir, r"--prompt=日本\n", *arguments) == expected
    (tmp_path / "prompt.txt").write_text("日本\n", encoding="utf-8-sig")  # with a byte order mark
    assert continued(capsys, workdir, f"--prompt_file={tmp_path / 'prompt.txt'}", *arguments) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("日本\n".encode("utf-8-sig"))))
    stops = (expected[24:28], expected[12:15])
    cut = continued(capsys, workdir, "--prompt=-", *arguments, *(f"--stop={stop}" for stop in stops))
    assert cut == expected[: min(map(expected.find, stops))]


@pytest.mark.parametrize("ending", ["interrupted", pytest.param("nobody reads on", marks=pytest.mark.slow)])
def test_generate_command_saves_the_context_of_the_printed_text_when_stopped(workdir, ending, tmp_path):
    arguments = ("--prompt=a", "--max_new_tokens=1000000", "--seed=4", f"--save_context={tmp_path / 'c'}")
    command = [sys.executable, "-W", "error", "-m", "rwkv_jax.generate", f"--model={workdir}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a suite in the background may ignore SIGINT, and its child processes inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, env=os.environ, **pipes) as process:
        out = process.stdout.read(10)
        assert out
        if ending == "interrupted":
            process.send_signal(signal.SIGINT)
            out += process.stdout.read()
            assert out.endswith(b"\n")
        else:
            process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == (130 if ending == "interrupted" else 0)
    text = load_context(tmp_path / "c", *unstacked("rwkv4"))[1]
    assert text.startswith("a" + out.decode(errors="ignore").rstrip("\n"))
    expected = "".join(stream(*unstacked("rwkv4"), "a", BYTES, max_new_tokens=20, seed=4)).encode()
    assert expected.startswith(out[:10])


def test_generate_command_passes_every_setting_to_stream(workdir, capsys, monkeypatch):
    settings = {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.001, "typical_p": 0.95, "seed": 3,
                "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
                "penalty_decay": 0.99, "max_new_tokens": 60}  # fmt: skip
    off = {name: None for name in settings if "penalty" in name or name in ("top_k", "min_p", "typical_p")}
    defaults = off | {"temperature": 1, "top_p": 1, "seed": 0, "penalty_decay": 1, "max_new_tokens": 100}
    seen = []

    def fake(model, params, prompt, tokenizer, **given):
        seen.append((model, prompt, tokenizer.name, given))
        return iter(["é", "b"])

    monkeypatch.setattr("rwkv_jax.generate.__main__.stream", fake)
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    assert continued(capsys, workdir, "--prompt=a", "--stop=x", r"--stop=y\nz", *arguments) == "éb"
    assert continued(capsys, workdir, "--prompt=") == "éb"
    model = unstacked("rwkv4")[0]
    assert seen == [
        (model, "a", "bytes", settings | {"stop": ["x", "y\nz"], "context": None}),
        (model, "", "bytes", defaults | {"stop": [], "context": None}),
    ]


def test_generate_command_and_chat_end_at_the_separator(tmp_path, capsys, monkeypatch):
    rwkv_jax.save(tmp_path / "model.pth", *cycling(":ab\0"))
    arguments = [f"--model={tmp_path / 'model.pth'}", "--tokenizer=bytes", "--temperature=1e-4"]
    assert RWKVForCausalLM(*cycling(":ab\0"), BYTES).generate(":", **NEARLY_GREEDY) == "ab"
    assert main([*arguments, "--prompt=:"]) == 0 and capsys.readouterr().out == "ab\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main([*arguments, "--chat"]) == 0 and capsys.readouterr().out == "ab\n"


def test_generate_command_continues_a_saved_context(workdir, capsys, tmp_path):
    path, greedy = tmp_path / "context", f"--temperature={NEARLY_GREEDY['temperature']}"
    whole = continued(capsys, workdir, "--prompt=ab", greedy, "--max_new_tokens=60")
    first = continued(capsys, workdir, "--prompt=ab", greedy, "--max_new_tokens=20", f"--save_context={path}")
    assert load_context(path, *unstacked("rwkv4"))[1] == "ab" + first
    second = continued(capsys, workdir, f"--context={path}", greedy, "--max_new_tokens=40", f"--save_context={path}")
    assert first + second == whole and load_context(path, *unstacked("rwkv4"))[1] == "ab" + whole


def test_generate_command_reports_mistakes_in_one_line(workdir, tmp_path, capsys):
    other, binary = tmp_path / "other", tmp_path / "binary"
    save_context(other, filled("hybrid", 1), *unstacked("hybrid"))
    binary.write_bytes(b"\xff\xfe")
    good = {"model": workdir, "prompt": "a"}
    for change, message in (
        ({"model": tmp_path / "none.pth"}, "none.pth"),
        ({"model": None}, "required: --model"),
        ({"tokenizer": tmp_path / "none.json"}, "none.json"),
        ({"top_p": 2}, "top_p is 2"),
        ({"top_k": "x"}, "top_k: invalid int value: 'x'"),
        ({"stop": ""}, "stop is"),
        ({"prompt": None}, "expected --prompt, "),
        ({"prompt_file": binary}, "not allowed with argument --prompt"),
        ({"prompt": None, "prompt_file": binary}, "binary: expected UTF-8"),
        ({"prompt": None, "prompt_file": tmp_path / "none"}, "none"),
        ({"context": other}, "other is the context of another model"),
        ({"save_context": tmp_path / "none" / "c"}, "no such folder"),
        ({"template": "raven"}, "--template is for --chat"),
    ):
        arguments = [f"--{name}={value}" for name, value in (good | change).items() if value is not None]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith("error: ") and message in err
    assert main([f"--model={workdir}", "--chat", "--stop=a"]) == 2
    assert capsys.readouterr().err == "error: --stop with --chat, where a reply ends with its paragraph\n"
