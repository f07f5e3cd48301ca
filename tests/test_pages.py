"""The shell blocks of the pages: every command parses, and the README's first commands do what it says."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from texts import write_jsonl
from training import write_text

from rwkv_jax import command, data
from rwkv_jax.__main__ import VERBS
from rwkv_jax.train import run_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "experiments" / "README.md"]
TINY = ("model.num_layers=1", "model.dim=16", "seq_len=16", "batch_size=4", "steps=2", "eval_tokens=64")


class ParsedError(Exception):
    """Raised in place of running a command whose arguments have been parsed."""


def commands(page):
    """Yield the words of each command in the shell blocks of a page, as a shell hands them on."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def of_readme(module, word):
    """Return the arguments of the one command of the README that runs this module with this word."""
    ((_, _, _, *arguments),) = (words for words in commands(README) if module in words and word in words)
    return arguments


def main(module):
    name = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
    return importlib.import_module(name).main


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_have_commands_that_parse(page, monkeypatch):
    def parsed(parser, *args):
        raise ParsedError(*parse(parser, *args))

    monkeypatch.chdir(ROOT)
    parse = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for program, *arguments in commands(page):
        if program in ("python", command.SCRIPT):
            by_verb = program == command.SCRIPT
            run = importlib.import_module(VERBS[arguments[0]][0]).main if by_verb else main(arguments[1])
            with pytest.raises(ParsedError) as stopped:
                run(arguments[1:] if by_verb else arguments[2:])
            args, rest = stopped.value.args
            assert not rest or run_config.read(args.config, rest)
        else:
            assert program == "pip" or (program == "make" and arguments[0] in targets)


@pytest.mark.slow
def test_readme_first_commands_do_what_it_says(tmp_path, monkeypatch, capsys):
    """Train, evaluate, continue a prompt, convert; on a small text, with a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    Path("configs").symlink_to(ROOT / "configs")
    text = write_text(tmp_path / "held_out.txt")
    small = [f"--config.{field}" for field in (*TINY, f"corpus={text}")]
    assert main("rwkv_jax.train")([*of_readme("rwkv_jax.train", "--workdir=runs/tiny"), *small]) == 0
    capsys.readouterr()
    assert main("rwkv_jax.evaluate")([*of_readme("rwkv_jax.evaluate", "--model=runs/tiny"), "--max_tokens=60"]) == 0
    assert capsys.readouterr().out.startswith("held_out.txt: 60 tokens, 60 bytes\n")
    assert main("rwkv_jax.generate")([*of_readme("rwkv_jax.generate", "--model=runs/tiny"), "--max_new_tokens=9"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main("rwkv_jax.interop")(of_readme("rwkv_jax.interop", "runs/tiny")) == 0
    assert Path("tiny.pth").is_file()


def test_readme_corpus_has_line_breaks_in_its_prompts(tmp_path, monkeypatch, capsys):
    """The command that describes the corpus and the one that fine-tunes on it agree."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "qa.jsonl", [{"question": f"{i}?", "answer": f"{i}!"} for i in range(99)])
    assert main("rwkv_jax.data")([*of_readme("rwkv_jax.data", "qa.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    _, _, *overrides = of_readme("rwkv_jax.train", "--config.corpus=qa.jsonl")
    config = run_config.read(str(ROOT / "configs" / "finetune.py"), overrides)
    corpus = data.prepare(config.corpus, text=config.data.text, prompt=config.data.prompt)
    assert corpus.sha256 == found["sha256"]
    begin, end = corpus.train.starts[:2] + 1
    document = bytes(np.asarray(corpus.train.tokens[begin : end - 1])).decode()
    assert re.fullmatch(r"Question: (\d+)\?\n\nAnswer: \1!", document)


def test_unescaped_reads_each_escape_as_one_character():
    assert command.unescaped(r"a\nb\tc\\nd\e" + "\\") == "a\nb\tc\\nd\\e\\"
