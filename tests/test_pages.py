"""The pages: every command in a shell block parses, Python blocks run, numbers are those of code and results."""

import argparse
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small import drawn
from texts import write_jsonl
from training import write_text

import rwkv_jax
from rwkv_jax import command, data, models
from rwkv_jax.__main__ import VERBS
from rwkv_jax.train import run_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "experiments" / "README.md"]
SUBJECTS = ("training", "models", "weights", "generation", "finetuning", "operators")
CACHE = 4096  # tokens for which the page of models gives the transformer room
TINY = ("model.num_layers=1", "model.dim=16", "seq_len=16", "batch_size=4", "steps=2", "eval_tokens=64")


class ParsedError(Exception):
    """Raised in place of running a command whose arguments have been parsed."""


def commands(page):
    """Yield the words of each command in the shell blocks of a page, as a shell hands them on."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def arguments_of(page, verb, word):
    """Return the arguments of the first command of a page that runs this verb, or its module, with this word."""
    module = VERBS[verb][0].removesuffix(".__main__")
    found = next(words for words in commands(page) if {verb, module} & set(words[:3]) and word in words)
    return found[2:] if found[0] == command.SCRIPT else found[3:]


def run(verb, arguments):
    return importlib.import_module(VERBS[verb][0]).main(arguments)


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
            with pytest.raises(ParsedError) as stopped:
                run(arguments[0], arguments[1:]) if by_verb else main(arguments[1])(arguments[2:])
            args, rest = stopped.value.args
            assert not rest or run_config.read(args.config, rest)
        else:
            assert program == "pip" or (program == "make" and arguments[0] in targets)


@pytest.mark.slow
def test_readme_first_commands_do_what_it_says(tmp_path, monkeypatch, capsys):
    """Train, evaluate, continue a prompt, convert, fine-tune; on a small text, with a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    Path("configs").symlink_to(ROOT / "configs")
    text = write_text(tmp_path / "held_out.txt")
    Path("notes.txt").symlink_to(text)
    of_readme = lambda verb, word: [
        "--config.finetune.model=runs/tiny" if argument.endswith("=BASE") else argument
        for argument in arguments_of(README, verb, word)
    ]
    small = [f"--config.{field}" for field in (*TINY, f"corpus={text}")]
    assert run("train", [*of_readme("train", "--workdir=runs/tiny"), *small]) == 0
    capsys.readouterr()
    assert run("evaluate", [*of_readme("evaluate", "--model=runs/tiny"), "--max_tokens=60"]) == 0
    assert capsys.readouterr().out.startswith("held_out.txt: 60 tokens, 60 bytes\n")
    assert run("generate", [*of_readme("generate", "--model=runs/tiny"), "--max_new_tokens=9"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert run("convert", of_readme("convert", "runs/tiny")) == 0
    assert Path("tiny.pth").is_file()
    few = [f"--config.{field}" for field in TINY if not field.startswith("model.")]
    assert run("train", [*of_readme("train", "--workdir=runs/lora"), *few]) == 0


def test_finetuning_page_has_line_breaks_in_its_prompts(tmp_path, monkeypatch, capsys):
    """The command that describes the corpus and the one that fine-tunes on it agree."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    page = ROOT / "docs" / "finetuning.md"
    write_jsonl(tmp_path / "qa.jsonl", [{"question": f"{i}?", "answer": f"{i}!"} for i in range(99)])
    assert run("corpora", [*arguments_of(page, "corpora", "qa.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    _, _, *overrides = arguments_of(page, "train", "--config.corpus=qa.jsonl")
    config = run_config.read(str(ROOT / "configs" / "finetune.py"), overrides)
    corpus = data.prepare(config.corpus, text=config.data.text, prompt=config.data.prompt)
    assert corpus.sha256 == found["sha256"]
    begin, end = corpus.train.starts[:2] + 1
    document = bytes(np.asarray(corpus.train.tokens[begin : end - 1])).decode()
    assert re.fullmatch(r"Question: (\d+)\?\n\nAnswer: \1!", document)


def test_unescaped_reads_each_escape_as_one_character():
    assert command.unescaped(r"a\nb\tc\\nd\e" + "\\") == "a\nb\tc\\nd\\e\\"


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_python_blocks_of_a_page_run(subject, tmp_path):
    """One after the other in one process, beside a tiny model of bytes at runs/tiny and a text, book.txt."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / f"docs/{subject}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    (tmp_path / "runs").mkdir()
    model, params = drawn(rwkv_jax.build("rwkv4", vocab_size=256, num_layers=2, dim=32))
    rwkv_jax.save(tmp_path / "runs" / "tiny", model, params)
    write_text(tmp_path / "book.txt")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RWKV_JAX_CACHE": str(tmp_path / "cache")}
    page = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(page, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rows(subject, cells):
    """The rows of tables on a page that have so many cells, in order."""
    lines = (ROOT / f"docs/{subject}.md").read_text().splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in found if len(row) == cells and row[1][:3] != "---"]


def test_sizes_of_the_models_page_are_those_of_the_code():
    num_bytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def row(name, size):
        model = rwkv_jax.build(name, size=size, dtype="bfloat16", param_dtype="bfloat16")
        params = models.parameter_shapes(model)
        number = sum(x.size for x in jax.tree.leaves(params))
        state = num_bytes(jax.eval_shape(lambda: model.init_state(1, CACHE)))
        total = num_bytes(params) + state
        return [name, size, f"{number:,}", *(f"{x:,.0f}" for x in (2e-6 * number, state / 1024, 1e-6 * total))]

    named = ((name, size) for name in ("rwkv4", "rwkv5", "rwkv6", "rwkv7") for size in models.KINDS[name].sizes)
    expected = [row(*model) for model in (*named, ("transformer", "169m"))]
    table = [row for row in rows("models", 6) if row[0].isalnum()]
    assert table[1:] == expected


def test_numbers_of_the_operators_page_are_those_of_the_results():
    speed = json.loads((ROOT / "experiments/speed/results.json").read_text())
    seconds = {(r["operator"], r["form"]): (r["forward"], r["both"]) for r in speed["rwkv7"]["operators"]}
    of_wkv4 = [r for r in speed["ops"]["rows"] if r["shape"] == [4, 1024, 512, "float32"]]
    for form in ("scan", "plain scan, autodiff"):
        seconds["wkv4", form] = tuple(r["seconds"] for r in of_wkv4 if r["form"] == form)
    times = {row[0]: row[1:] for row in rows("operators", 5) if row[0].startswith("`wkv")}
    assert len(times) == 4
    for name, row in times.items():
        operator, form = name.replace("`", "").split(", ")
        plain = seconds[operator, "plain scan, autodiff"]
        assert row == [f"{1e3 * x:,.1f}" for x in (*seconds[operator, form], *plain)], name

    precision = json.loads((ROOT / "experiments/precision/results.json").read_text())
    claims = [(claim, x) for claim, x, _ in precision["claims"] if "float32" in claim]
    share = lambda *versions: math.ceil(100 * max(x for claim, x in claims if claim[:5] in versions)) / 100
    told = f"{share('WKV-4'):.2f} of its bound in `wkv4`, {share('WKV-5', 'WKV-6'):.2f} in `wkv6` and "
    told += f"{share('WKV-7'):.2f} in `wkv7`"
    assert told in " ".join((ROOT / "docs/operators.md").read_text().split())
