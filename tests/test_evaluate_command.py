"""`python -m rwkv_jax.evaluate`: its report, the bytes that it counts, and mistakes in one line."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from small import drawn

import rwkv_jax
from rwkv_jax import checkpoint, evaluate
from rwkv_jax.data.tokenizers import get_tokenizer

FIELDS = {"vocab_size": 256, "num_layers": 2, "dim": 8, "matmul_precision": "highest"}
SEQ_LEN = 16


@pytest.fixture(scope="module")
def case():
    return drawn(rwkv_jax.build("rwkv4", **FIELDS))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, case):
    """A training run."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoints", 3, {"params": case[1]})
    config = {"model": {"name": "rwkv4"} | FIELDS, "tokenizer": "bytes", "seq_len": SEQ_LEN}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(bytes(range(256)) + "Käse 日本\n".encode() * 3)
    return path


def test_evaluate_command_reports_a_training_run(workdir, case, text, capsys):
    argv = [f"--model={workdir}", f"--data={text}", "--batch_size=4"]
    assert evaluate.main([*argv, "--json"]) == 0
    model, params = case
    tokens = np.frombuffer(b"\0" + text.read_bytes(), np.uint8)
    windows = evaluate.windows(model, params, tokens, SEQ_LEN, 4)[1:]
    best = evaluate.best_practice(model, params, tokens, np.array([0]), SEQ_LEN, 4)[1:]
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == report["bytes"] == len(tokens) - 1
    assert report["windows"]["bits_per_byte"] == pytest.approx(windows.mean() / np.log(2))
    assert report["best_practice"]["bits_per_byte"] == pytest.approx(best.mean() / np.log(2))
    assert report["best_practice"]["perplexity"] == pytest.approx(np.exp(best.mean()))
    assert report["best_practice_is"] == "carried"

    assert evaluate.main([*argv, "--max_tokens=40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{text}: 40 tokens, 40 bytes"
    assert float(lines[1].split()[1]) == pytest.approx(windows[:40].mean() / np.log(2), abs=1e-4)
    assert float(lines[2].split()[1]) == pytest.approx(best[:40].mean() / np.log(2), abs=1e-4)


def test_held_out_counts_bytes_of_the_text_and_not_tokens(tmp_path):
    text = "Käse und Käse und Käse\n"
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([text], vocab_size=280, show_progress=False)
    library.save(str(tmp_path / "bpe.json"))
    (tmp_path / "text.txt").write_text(text)
    tokenizer = get_tokenizer(str(tmp_path / "bpe.json"))
    whole = evaluate._held_out(str(tmp_path / "text.txt"), tokenizer, None)
    assert whole.num_bytes == len(text.encode()) > len(whole.tokens)
    part = evaluate._held_out(str(tmp_path / "text.txt"), tokenizer, 2)
    assert part.tokens.tolist() == [0, *tokenizer.encode(text)[:2]]
    assert part.num_bytes == len(tokenizer.decode(part.tokens[1:]).encode())


def test_held_out_counts_bytes_of_the_file_under_a_normalising_tokenizer(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.save(str(tmp_path / "nfkc.json"))
    (tmp_path / "text.txt").write_text("\uff41\uff42" * 10)  # full-width a and b, 3 bytes each
    split = evaluate._held_out(str(tmp_path / "text.txt"), get_tokenizer(str(tmp_path / "nfkc.json")), None)
    assert split.num_bytes == 60 and len(split.tokens) == 21


def test_evaluate_command_counts_the_bytes_read_from_a_pipe(workdir, tmp_path, capsys):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.save(str(tmp_path / "ab.json"))
    reader, writer = os.pipe()
    os.write(writer, "abé".encode() * 10)
    os.close(writer)
    argv = [f"--model={workdir}", f"--data=/dev/fd/{reader}", f"--tokenizer={tmp_path / 'ab.json'}", "--json"]
    assert evaluate.main(argv) == 0
    os.close(reader)
    report = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["bytes"]) == (30, 40)
    assert report["windows"]["bits_per_byte"] == pytest.approx(np.log2(report["windows"]["perplexity"]) * 30 / 40)


def test_evaluate_command_accepts_a_file_whose_name_is_not_utf8(case, workdir, tmp_path, capsysbinary):
    path = os.fsencode(tmp_path) + b"/K\xe4se.txt"
    with open(path, "wb") as file:
        file.write(b"some text")
    argv = [f"--model={workdir}", f"--data={os.fsdecode(path)}"]
    assert evaluate.main(argv) == 0
    assert capsysbinary.readouterr().out.startswith(path + b": 9 tokens, 9 bytes\nwindows ")
    assert evaluate.main([*argv, "--json"]) == 0
    assert os.fsencode(json.loads(capsysbinary.readouterr().out)["data"]) == path


def test_evaluate_command_writes_json_of_a_model_that_is_not_finite(case, workdir, text, capsys, monkeypatch):
    model, params = case
    broken = model, jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), params)
    monkeypatch.setattr(evaluate.runs, "load", lambda path: broken)
    assert evaluate.main([f"--model={workdir}", f"--data={text}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["windows"] == report["best_practice"] == {"bits_per_byte": None, "perplexity": None}


def test_held_out_refuses_a_pipe_of_compressed_text():
    reader, writer = os.pipe()
    os.write(writer, gzip.compress(b"text"))
    os.close(writer)
    with pytest.raises(ValueError, match=r"^/dev/fd/\d+ is gzip, not text: decompress it first$"):
        evaluate._held_out(f"/dev/fd/{reader}", get_tokenizer("bytes"), None)
    os.close(reader)


def test_evaluate_command_reports_that_it_reads_json_lines_as_text(case, workdir, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"text": "a"}\n' * 9)
    assert evaluate.main([f"--model={workdir}", f"--data={tmp_path / 'a.json'}"]) == 0
    out, err = capsys.readouterr()
    assert "126 bytes" in out and err.startswith(f"{tmp_path / 'a.json'} holds JSON lines") and err.count("\n") == 1


def test_held_out_refuses_tokens_without_text(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.decoder = tokenizers.decoders.Replace("b", "")
    library.save(str(tmp_path / "ab.json"))
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"the first 1 tokens of .*b\.txt have no text, expected a larger max_tokens"):
        evaluate._held_out(str(tmp_path / "b.txt"), get_tokenizer(str(tmp_path / "ab.json")), 1)


def test_evaluate_command_reports_mistakes_in_one_line(workdir, case, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"K\xe4se")
    (tmp_path / "packed.txt").write_bytes(gzip.compress(b"text"))
    np.save(tmp_path / "a.npy", np.arange(9))
    for size in (10, 300):
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
        library.save(str(tmp_path / f"{size}.json"))
    load = evaluate.runs.load
    monkeypatch.setattr(evaluate.runs, "load", lambda path: case if Path(path) == workdir else load(path))
    good = {"model": workdir, "data": text}
    for change, message in (
        ({"model": tmp_path / "none.pth"}, "none.pth: no such file"),
        ({"data": tmp_path / "empty.txt"}, "empty.txt is empty"),
        ({"data": tmp_path / "latin.txt", "tokenizer": tmp_path / "10.json"}, "latin.txt is not UTF-8"),
        ({"data": tmp_path / "packed.txt"}, "packed.txt is gzip, not text: decompress it first"),
        ({"data": tmp_path / "a.npy"}, "a.npy holds tokens, expected a file of text"),
        ({"data": tmp_path}, "is a folder, expected a file of text"),
        ({"data": tmp_path / "absent"}, "absent: no such file, expected text"),
        ({"tokenizer": tmp_path / "300.json"}, "has 300 tokens, the model only 256"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"seq_len": 2**70}, "seq_len is 1180591620717411303424"),
        ({"batch_size": 2**70}, "batch_size 1180591620717411303424, expected at least 1, and below 2^31"),
    ):
        assert evaluate.main([f"--{name}={value}" for name, value in (good | change).items()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err


@pytest.mark.slow
def test_evaluate_command_prints_no_warnings(workdir, text):
    argv = [f"--model={workdir}", f"--data={text}"]
    command = [sys.executable, "-W", "error", "-m", "rwkv_jax.evaluate", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("bits/byte") == 2
