"""`python -m rwkv_jax.generate`."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from generating import FIELDS, case, ids, unstacked

from rwkv_jax import checkpoint
from rwkv_jax.generate import generate_texts, load_context, read, save_context, stream
from rwkv_jax.generate.__main__ import main
from rwkv_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoints", 3, {"params": case("rwkv4")[1]})
    config = {"model": {"name": "rwkv4", "num_layers": 1} | FIELDS, "tokenizer": "bytes", "seq_len": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def command(*arguments):
    return [sys.executable, "-W", "error", "-m", "rwkv_jax.generate", *map(str, arguments)]


def continued(capsys, workdir, *arguments):
    assert main([f"--model={workdir}", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("\n")
    return out[:-1]


def test_command_line(workdir):
    settings = {"max_new_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 4}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        command(f"--model={workdir}", "--prompt=日本", *arguments), capture_output=True, env=os.environ
    )
    expected = "".join(stream(*unstacked("rwkv4"), "日本", BYTES, **settings))
    assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", expected + "\n")


@pytest.mark.parametrize("ending", ["interrupted", pytest.param("nobody reads on", marks=pytest.mark.slow)])
def test_command_line_stops_when_told(workdir, ending, tmp_path):
    arguments = (f"--model={workdir}", "--prompt=a", "--max_new_tokens=1000000", f"--save_context={tmp_path / 'c'}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a suite that runs in the background may have SIGINT ignored, which its children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command(*arguments), env=os.environ, **pipes) as process:
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


@pytest.mark.slow
def test_every_setting_arrives(workdir, capsys):
    settings = {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.001, "typical_p": 0.95, "seed": 3,
                "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
                "penalty_decay": 0.99, "max_new_tokens": 60}  # fmt: skip
    expected = generate_texts(*unstacked("rwkv4"), ["a"], BYTES, **settings).texts[0]
    seen = {continued(capsys, workdir, "--prompt=a", *(f"--{name}={value}" for name, value in settings.items()))}
    assert seen == {expected}
    for name in settings:
        seen.add(continued(capsys, workdir, "--prompt=a", *(f"--{n}={v}" for n, v in settings.items() if n != name)))
    assert len(seen) > len(settings) - 2  # without one of them it is another text; min_p and typical_p rarely bite


def test_prompts_from_files(workdir, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("日本\n")
    expected = continued(capsys, workdir, "--prompt=日本\n")
    assert continued(capsys, workdir, f"--prompt_file={tmp_path / 'prompt.txt'}") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("日本\n".encode())))
    assert continued(capsys, workdir, "--prompt=-") == expected


def test_stop_strings(workdir, capsys):
    whole = continued(capsys, workdir, "--prompt=a", "--temperature=2")
    first, second = whole[40:44], whole[20:23]
    expected = whole[: min(whole.find(first), whole.find(second))]
    arguments = ("--prompt=a", "--temperature=2", f"--stop={first}", f"--stop={second}")
    assert continued(capsys, workdir, *arguments) == expected


def test_contexts_from_and_to_files(workdir, capsys, tmp_path):
    path, greedy = tmp_path / "context", "--temperature=0"
    whole = continued(capsys, workdir, "--prompt=ab", greedy, "--max_new_tokens=60")
    first = continued(capsys, workdir, "--prompt=ab", greedy, "--max_new_tokens=20", f"--save_context={path}")
    assert load_context(path, *unstacked("rwkv4"))[1] == "ab" + first
    second = continued(capsys, workdir, f"--context={path}", greedy, "--max_new_tokens=40", f"--save_context={path}")
    assert first + second == whole and load_context(path, *unstacked("rwkv4"))[1] == "ab" + whole


def test_command_line_says_what_is_wrong_in_one_line(workdir, tmp_path, capsys):
    other, binary = tmp_path / "other", tmp_path / "binary"
    save_context(other, read(*unstacked("hybrid"), ids(3)), *unstacked("hybrid"))
    binary.write_bytes(b"\xff\xfe")
    good = {"model": workdir, "prompt": "a"}
    for change, message in (
        ({"model": tmp_path / "none.pth"}, "none.pth"),
        ({"model": tmp_path}, "config.json"),
        ({"model": None}, "required: --model"),
        ({"tokenizer": tmp_path / "none.json"}, "none.json"),
        ({"top_p": 2}, "top_p is 2"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": "x"}, "top_k: invalid int value: 'x'"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"stop": ""}, "stop is"),
        ({"penalty_decay": 2}, "decay of penalties is 2"),
        ({"prompt": None}, "expected --prompt, "),
        ({"prompt_file": binary}, "not allowed with argument --prompt"),
        ({"prompt": None, "prompt_file": binary}, "binary: expected UTF-8"),
        ({"prompt": None, "prompt_file": tmp_path / "none"}, "none"),
        ({"context": tmp_path / "none"}, "none: no such file"),
        ({"context": other}, "other is the context of another model"),
        ({"context": binary}, "binary: truncated"),
        ({"save_context": tmp_path / "none" / "c"}, "no such folder"),
        ({"wrong": 1}, "unrecognized arguments: --wrong=1"),
    ):
        arguments = [f"--{name}={value}" for name, value in (good | change).items() if value is not None]
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ") and message in err
