"""`python -m rwkv_jax.data`: the report, Megatron files, and mistakes in one line."""

import json
from pathlib import Path

import pytest
from texts import words, write_jsonl

from rwkv_jax.data import __main__ as command
from rwkv_jax.data import prepare

GOLDENS = Path(__file__).parents[1] / "goldens"
BPE = str(GOLDENS / "binidx_tokenizer.json")


def test_data_command_reports_sizes_and_copies(tmp_path, capsys):
    texts = [words(i) for i in range(100)]
    texts += [texts[0], texts[1], texts[1], "short"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert command.main([source, "--json", f"--tokenizer={BPE}"]) == 0
    found = json.loads(capsys.readouterr().out)
    corpus = prepare(source, BPE)
    assert (found["name"], found["sha256"], found["vocab_size"]) == ("a.jsonl", corpus.sha256, 264)
    rows = [found[name] for name in ("train", "valid", "test")]
    assert [row["tokens"] for row in rows] == [len(split.tokens) for split in corpus[4:]]
    assert sum(row["documents"] for row in rows) == len(texts)
    assert sum(row["bytes"] for row in rows) == sum(len(text.encode()) for text in texts)
    assert sum(row["copies"] for row in rows) == 3
    text_tokens = rows[0]["tokens"] - rows[0]["documents"]
    assert rows[0]["bytes_per_token"] == rows[0]["bytes"] / text_tokens

    assert command.main([source, f"--tokenizer={BPE}"]) == 0
    first, header, train, _, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("a.jsonl: tokenizer ") and header.split()[0] == "tokens"
    assert train.split()[:3] == ["train", f"{rows[0]['tokens']:,}", str(rows[0]["documents"])]


def test_data_command_writes_megatron_files(tmp_path, capsys):
    arguments = [str(GOLDENS / "binidx.jsonl"), f"--tokenizer={BPE}", f"--write={tmp_path / 'own'}"]
    assert command.main(arguments) == 0
    assert "5 documents written" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.bin", "own.idx"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "error: no corpus nowhere: expected"),
        (["a.jsonl", "--write=b", "--prompt=q"], "error: --write with --prompt"),
        (["a.jsonl", "--write=b", "--json"], "error: --write with --json"),
        ([str(GOLDENS / "binidx.bin"), "--write=b"], f"error: {GOLDENS / 'binidx.bin'} holds tokens, expected text"),
    ],
)
def test_data_command_reports_mistakes_in_one_line(capsys, arguments, line):
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1
