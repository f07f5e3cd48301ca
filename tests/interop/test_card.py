"""The model card of a folder: its facts, where they come from, and whose README.md is replaced."""

import json
import re

import jax
import pytest
from weights import D, L, V, tiny, write_workdir

import rwkv_jax
from rwkv_jax import runs
from rwkv_jax.data import tokenizers
from rwkv_jax.interop import card
from rwkv_jax.interop.__main__ import main

CONFIG = {"batch_size": 4, "seq_len": 16, "corpus": "a|b.txt", "finetune": {"model": ""}, "optim": {"lr": 0.5}}


def rows_of(folder):
    text = (folder / "README.md").read_text()
    return dict(re.findall(r"^\| ([\w -]+) \| (.*) \|$", text, re.MULTILINE)), text


def workdir(path, *steps, **config):
    """A run with a checkpoint at each step, and a log that goes beyond the last one."""
    write_workdir(path, *tiny(), *steps)
    record = json.loads((path / "config.json").read_text())
    record |= {"corpus": {"name": "a|b", "sha256": "f" * 64}, "config": CONFIG | config, "versions": {"jax": "1.2.3"}}
    (path / "config.json").write_text(json.dumps(record))
    log = [{"step": step, "loss_nats": 10.0 - step, "tokens_per_second": 7.0} for step in range(1, 9)]
    log += [{"step": 2, "valid_loss_nats": 5.25}, {"step": 7, "valid_loss_nats": 0.5}]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in log) + '{"step": 2, "loss')


def test_card_of_a_run_has_what_the_run_knows_at_its_checkpoint(tmp_path, capsys):
    workdir(tmp_path / "run", 2, 3)
    assert main([str(tmp_path / "run"), str(tmp_path / "m")]) == 0
    capsys.readouterr()
    rows, text = rows_of(tmp_path / "m")
    assert text.startswith("---\nlicense: unknown\nlibrary_name: rwkv_jax\n") and "\n# m\n" in text
    assert rows["model"] == f"RWKV-4, {L} layers of width {D}, vocabulary of {V}"
    assert rows["parameters"] == f"{sum(x.size for x in jax.tree.leaves(tiny()[1])):,}, float32"
    assert rows["training data"] == rf"a\|b, SHA-256 {'f' * 64}"
    assert (rows["steps"], rows["tokens seen"]) == ("3", "192")
    assert (rows["last loss"], rows["last held-out loss"]) == ("7.0000 nats a token", "5.2500 nats a token")
    assert (rows["started from"], rows["trained with"]) == ("random weights", "jax 1.2.3")
    assert f"rwkv_jax {rwkv_jax.__version__}, python " in rows["written by"] and "Apache-2.0" in rows["licence"]
    assert '"lr": 0.5' in text and "RWKVForCausalLM.from_pretrained" in text
    (tmp_path / "run" / "checkpoints" / "3" / "manifest.json").unlink()  # the parameters are then those of step 2
    assert runs.load_with_training(tmp_path / "run")[2]["loss_nats"] == 8.0


def test_training_of_a_run_names_what_it_started_from(tmp_path):
    for name, config, started, tokens in (
        ("fine-tuned", {"finetune": {"model": "/base.pth"}}, "/base.pth", 64),
        ("branch", {"branch_from": "runs/a/checkpoints/1"}, "runs/a/checkpoints/1", None),  # whose batches are unknown
    ):
        workdir(tmp_path / name, 1, **config)
        training = runs.load_with_training(tmp_path / name)[2]
        assert (training["started_from"], training.get("tokens")) == (started, tokens)


def test_card_of_weights_alone_says_unknown(tmp_path):
    rwkv_jax.save(tmp_path / "m", *tiny())
    rows, text = rows_of(tmp_path / "m")
    unknown = {"tokenizer", "training data", "tokens seen", "steps", "last loss", "last held-out loss"}
    assert {name for name, value in rows.items() if value == "unknown"} == unknown | {"started from", "trained with"}
    assert "```json" not in text
    assert runs.load_with_training(tmp_path / "m")[2] is None


def test_card_carries_its_facts_through_another_save(tmp_path):
    training = {"corpus": "a", "steps": 3, "tokens": 64, "loss_nats": 1.5, "config": CONFIG, "versions": {"jax": "1"}}
    lm = rwkv_jax.RWKVForCausalLM(*tiny(scan=False, vocab_size=256), tokenizers.get_tokenizer("bytes"), training)
    lm.save_pretrained(tmp_path / "a")
    again = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "a")
    assert again.training == training
    again.save_pretrained(tmp_path / "b")
    (rows, text), (_, first) = rows_of(tmp_path / "b"), rows_of(tmp_path / "a")
    assert rows["tokenizer"] == "bytes, 256 tokens"
    assert [line for line in text.splitlines()[:-1] if line != "# b"] == [
        line for line in first.splitlines()[:-1] if line != "# a"
    ]
    again.save_pretrained(tmp_path / "a")  # over its own
    assert (tmp_path / "a" / "README.md").read_text() == first


@pytest.mark.parametrize("change", ["theirs", "edited", "link", "folder"])
def test_card_never_replaces_the_readme_of_somebody_else(change, tmp_path, capsys):
    model, params = tiny()
    folder, readme = tmp_path / "m", tmp_path / "m" / "README.md"
    rwkv_jax.save(folder, model, params, training={"steps": 3})
    edited = readme.read_bytes().replace(b"# m\n", b"# My model\n")
    readme.unlink()
    match change:
        case "link":
            readme.symlink_to("nowhere")
        case "folder":
            readme.mkdir()
        case _:
            readme.write_bytes(edited if change == "edited" else b"# Theirs\n\xff\n")
    before = (readme.is_symlink(), readme.is_dir(), readme.read_bytes() if readme.is_file() else None)
    rwkv_jax.save(folder, model, params)
    assert (readme.is_symlink(), readme.is_dir(), readme.read_bytes() if readme.is_file() else None) == before
    assert capsys.readouterr().err == f"{readme} is not as rwkv_jax wrote it, so it stays: no model card written\n"
    assert card.read(folder) is None


def test_card_takes_facts_of_their_type_only():
    given = {"steps": "3", "tokens": 4, "loss_nats": None, "config": [], "corpus": "c", "else": 1}
    assert card.known(given) == {"tokens": 4, "corpus": "c"}
    given = {"steps": True, "loss_nats": float("nan"), "valid_loss_nats": 2}
    assert card.known(given) == {"valid_loss_nats": 2}


def test_card_names_no_folder_of_this_machine_and_no_logger():
    corpus = "/home/me/a.txt:0.7,~/texts/b.jsonl:0.3,hf:owner/name,./c.txt"
    given = {"corpus": corpus, "config": {"logging": {"wandb_project": "mine"}, "finetune": {"model": "../runs/base"}}}
    assert card.public(given) == {
        "corpus": "a.txt:0.7,b.jsonl:0.3,hf:owner/name,c.txt",
        "config": {"finetune": {"model": "base"}},
    }
