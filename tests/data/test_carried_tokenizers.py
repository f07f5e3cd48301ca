"""The tokenizer of a model: stored in its folder, copied by a run, or guessed with a line on stderr."""

import errno
import json
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from small import drawn, make
from texts import byte_level, write_jsonl
from weights import one_line

import rwkv_jax
from rwkv_jax import RWKVForCausalLM, data
from rwkv_jax.data.tokenizers import (
    WORLD_FILE,
    ByteTokenizer,
    characters,
    get_tokenizer,
    of_model,
    save,
    warn_if_small,
)
from rwkv_jax.generate.__main__ import main as generate
from rwkv_jax.train import assemble, run_config, workdir

TEXT = "Ein Käfer sang: 日本語, naïve 😀\n\n  indented   \t x\n\nreturn value\n"


@pytest.fixture
def neox(tmp_path_factory, monkeypatch):
    """A tokenizer file with the last id of NeoX-20B; no other place that `of_model` searches holds a file."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    path = Path(byte_level(tmp_path_factory.mktemp("neox") / "neox.json", TEXT))
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 50_276
    path.write_text(json.dumps(content))
    return path


def tokenizer_of(kind, folder):
    """A tokenizer of that kind, read from a file in `folder` if the kind has one."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "characters":
        return characters([TEXT])
    if kind == "bpe":
        return get_tokenizer(byte_level(folder / "bpe.json", TEXT))
    path = folder / "vocab.json"
    path.write_text(json.dumps({str(i): c for i, c in enumerate(sorted(set(TEXT)))}))
    return get_tokenizer(str(path))


# ---- saved in a folder


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe", "released characters"])
def test_of_model_finds_the_saved_tokenizer_in_a_moved_folder(kind, tmp_path, capsys):
    tokenizer = tokenizer_of(kind, tmp_path)
    (tmp_path / "model").mkdir()
    assert save(tokenizer, tmp_path / "model") == "tokenizer.json"
    shutil.move(tmp_path / "model", tmp_path / "moved")
    carried = get_tokenizer(of_model(tmp_path / "moved", tokenizer.vocab_size))
    assert type(carried) is type(tokenizer) and carried.vocab_size == tokenizer.vocab_size
    assert carried.encode(TEXT) == tokenizer.encode(TEXT) and carried.decode(carried.encode(TEXT)) == TEXT
    assert capsys.readouterr().err == "", "nothing was guessed"
    if kind == "bpe":
        assert (tmp_path / "moved/tokenizer.json").read_bytes() == (tmp_path / "bpe.json").read_bytes()


def test_of_model_finds_the_world_vocabulary_and_the_last_tokenizer_saved(world, tmp_path, capsys):
    assert save(world, tmp_path) == WORLD_FILE
    carried = get_tokenizer(of_model(tmp_path, 65_536))
    assert carried.name == str(tmp_path / WORLD_FILE) and carried.token_bytes == world.token_bytes
    assert carried.encode(TEXT) == world.encode(TEXT)
    for other in (ByteTokenizer(), world):  # the last one saved counts
        save(other, tmp_path)
        assert get_tokenizer(of_model(tmp_path, other.vocab_size)).vocab_size == other.vocab_size
    assert capsys.readouterr().err == ""


def test_of_model_names_a_damaged_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"tokenizer": "tokenizer.json"}')
    with pytest.raises(ValueError, match=r"names the tokenizer tokenizer\.json, which is not in the folder"):
        of_model(tmp_path / "run", 256)
    (tmp_path / "run/config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: holds a JSON list, expected an object"):
        of_model(tmp_path / "run", 300)


# ---- guessed


@pytest.mark.parametrize("vocab_size, name", [(256, "bytes"), (65_536, "world")])
def test_of_model_reports_a_tokenizer_guessed_from_the_vocabulary_size(vocab_size, name, tmp_path, capsys):
    for path in (tmp_path, tmp_path / "model.pth"):
        assert of_model(path, vocab_size) == name
        line = f"{path} has no tokenizer: {name}, guessed from its vocabulary of {vocab_size}\n"
        assert capsys.readouterr().err == line


def test_of_model_refuses_unknown_vocabulary_sizes_and_a_missing_neox_file(tmp_path, neox):
    with one_line(
        rf"^no NeoX-20B tokenizer in {tmp_path} or \. or the .*20B_tokenizer.json of Blink", FileNotFoundError
    ):
        of_model(tmp_path / "model.pth", 50_277)
    for vocab_size in (255, 50_276, 50_278, 50_440):
        with one_line(rf"none is known for its vocabulary of {vocab_size}: expected tokenizer='bytes', "):
            of_model(tmp_path / "model.pth", vocab_size)


@pytest.mark.parametrize("place", ["20B_tokenizer.json", "tokenizer.json", "current folder", "cache"])
def test_of_model_finds_neox_beside_the_model_in_the_cwd_and_in_the_cache(place, neox, tmp_path, capsys):
    from huggingface_hub import constants

    byte_level(tmp_path / "tokenizer.json", TEXT)  # belongs to another model: too small
    snapshots = Path(constants.HF_HUB_CACHE) / "models--EleutherAI--gpt-neox-20b"
    target = {
        "current folder": Path("20B_tokenizer.json"),
        "cache": snapshots / "snapshots" / "abc" / "tokenizer.json",
    }.get(place, tmp_path / place)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(neox, target)
    if place == "cache":
        (snapshots / "refs").mkdir()
        (snapshots / "refs" / "main").write_text("abc")
    for vocab_size in (50_277, 50_432):
        name = of_model(tmp_path / "model.pth", vocab_size)
        assert os.path.samefile(name, target)
        assert capsys.readouterr().err.count("\n") == 1
    assert get_tokenizer(name).vocab_size == 50_277


# ---- in runs


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("".join(rng.choice(list("abc dé日\n"), 4_000)) + "z")
    return str(tmp_path / "corpus.txt")


def _config(text, tokenizer, vocab_size=300):
    config = run_config.default()
    config.model.update(num_layers=1, dim=8, vocab_size=vocab_size)
    config.update(corpus=text, tokenizer=tokenizer, steps=2, seq_len=8, batch_size=2, eval_tokens=16, save_every=1)
    return config


def begin(config, folder):
    """Prepare a run and its workdir up to the first logged step, and return the run."""
    run = assemble.assembled(config, folder)
    folder.mkdir(exist_ok=True)
    workdir.write_config(folder, run.config, run_config.model_fields(run.config), run.corpus)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def test_prepare_builds_characters_from_the_training_split_alone(text, tmp_path):
    corpus = data.prepare(text, "characters")
    tokenizer = get_tokenizer(corpus.tokenizer)
    assert corpus.vocab_size == tokenizer.vocab_size == 2 + len(set("abc dé日\n"))
    whole = Path(text).read_text()
    parts = [tokenizer.decode(split.tokens[1:]) for split in corpus[4:]]
    assert "".join(parts) == whole[:-1] + "\ufffd", "z is not in the training split"
    again = data.prepare(text, "characters")
    assert (again.sha256, again.tokenizer) == (corpus.sha256, corpus.tokenizer)
    os.remove(corpus.tokenizer)  # a damaged cache is rebuilt
    assert data.prepare(text, "characters").sha256 == corpus.sha256


def test_prepare_builds_characters_from_prompts_too(tmp_path):
    """Most letters of the prompts, those of the template among them, are in no text."""
    records = [{"q": f"日{i}?", "a": "yes"} for i in range(50)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    corpus = data.prepare(source, "characters", text=" {a}", prompt="Q: {q}\nA:")
    train = get_tokenizer(corpus.tokenizer).decode(corpus.train.tokens)
    assert "Q: 日" in train and "?\nA: yes" in train and "\ufffd" not in train


def test_prepare_identifies_a_saved_byte_tokenizer_by_its_name(tmp_path, monkeypatch):
    """The text has the size of enwik8, which is cut inside a character, as only bytes allow."""
    monkeypatch.setattr("rwkv_jax.data.text._ENWIK8_BYTES", 3001)
    (tmp_path / "a.txt").write_text("a" + "日" * 1000)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        save(ByteTokenizer(), tmp_path / folder)
    names = [*map(str, tmp_path.glob("*/tokenizer.json")), "bytes"]
    found = [data.prepare(str(tmp_path / "a.txt"), name) for name in names]
    assert len(found) == 3 and len({corpus.sha256 for corpus in found}) == 1
    assert len(found[0].train.tokens) == 1 + 2700


def test_save_leaves_the_old_tokenizer_whole_where_it_cannot_write_the_new(tmp_path, monkeypatch):
    save(ByteTokenizer(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("rwkv_jax.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(characters([TEXT]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_of_characters_ignores_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "characters").write_text("{}")
    (tmp_path / "model").mkdir()
    save(characters([TEXT]), tmp_path / "model")
    assert get_tokenizer(str(tmp_path / "model/tokenizer.json")).encode(TEXT) == characters([TEXT]).encode(TEXT)


def test_warn_if_small_reports_a_tokenizer_far_smaller_than_the_vocabulary(tmp_path, capsys):
    tokenizer = get_tokenizer(byte_level(tmp_path / "small.json", TEXT))
    for padded in (300, 333):
        warn_if_small(tokenizer.name, tokenizer.vocab_size, padded)
    assert tokenizer.vocab_size == 300 and capsys.readouterr().err == ""
    rwkv_jax.save(tmp_path / "model.pth", *drawn(make("rwkv4", vocab_size=400)))
    arguments = [f"--model={tmp_path / 'model.pth'}", f"--tokenizer={tmp_path / 'small.json'}"]
    assert generate([*arguments, "--prompt=a", "--max_new_tokens=0"]) == 0
    RWKVForCausalLM.from_pretrained(tmp_path / "model.pth", tokenizer=str(tmp_path / "small.json"))
    assert generate([*arguments[:1], "--tokenizer=bytes", "--prompt=a"]) == 2  # refused, so no warning
    *lines, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: tokenizer bytes has 256 tokens, the model 400")
    assert len(lines) == 2 and all("small.json has 300 tokens, the model 400" in line for line in lines)


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_workdir_carries_its_tokenizer_when_moved(kind, text, tmp_path):
    name = byte_level(tmp_path / "own/any name.json", TEXT) if kind == "bpe" else kind
    config = _config(text, name)
    sha256 = begin(config, tmp_path / "run").corpus.sha256
    assert json.loads((tmp_path / "run/config.json").read_text())["tokenizer"] == "tokenizer.json"
    expected = get_tokenizer(data.prepare(text, name).tokenizer).encode(TEXT)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")
    if kind == "bpe":
        shutil.rmtree(tmp_path / "own")
    carried = of_model(tmp_path / "moved", 300)
    assert carried == str(tmp_path / "moved/tokenizer.json") and get_tokenizer(carried).encode(TEXT) == expected
    before = (tmp_path / "moved/tokenizer.json").read_bytes()
    assert begin(config, tmp_path / "moved").corpus.sha256 == sha256  # the file named in the config is gone
    if kind == "bpe":
        config.tokenizer = carried  # the same tokenizer under another name
        assert begin(config, tmp_path / "moved").corpus.sha256 == sha256
    config.tokenizer = byte_level(tmp_path / "other.json", TEXT, vocab_size=290)
    with one_line(r"run of another config: tokenizer was .*; corpus\.sha256 was "):
        begin(config, tmp_path / "moved")
    assert (tmp_path / "moved/tokenizer.json").read_bytes() == before


# ---- live judges


def much_text():
    """Text of many kinds: code, scripts, symbols, runs of spaces, control characters."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    yield from (path.read_text() for path in sorted(stdlib.glob("*.py"))[:60])
    yield TEXT
    yield "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11_0000, 7)]))
    rng = np.random.default_rng(0)
    for low, high in [(0, 128), (0x20, 0x250), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (9, 33)]:
        yield "".join(map(chr, rng.integers(low, high, 20_000)))


@pytest.mark.live
def test_world_tokenizer_equals_that_of_the_rwkv_package():
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    judge = TRIE_TOKENIZER(str(Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")))
    world = get_tokenizer("world")
    assert {i: b for i, b in enumerate(world.token_bytes) if b} == judge.idx2token
    for text in much_text():
        ids = world.encode(text)
        assert ids == judge.encode(text) and world.decode(ids) == text
        data = text.encode()
        blocks = [data[i : i + 70_000] for i in range(0, len(data), 70_000)]
        pieces = [ids for _, ids in world.encode_documents([blocks])]
        assert np.concatenate(pieces).tolist() == ids
    rng = np.random.default_rng(1)
    for _ in range(300):  # any bytes: the judge returns bytes, which Python decodes
        ids = rng.integers(1, 65_530 if rng.random() < 0.5 else 257, rng.integers(1, 50)).tolist()
        assert world.decode(ids) == judge.decodeBytes(ids).decode(errors="replace")


@pytest.mark.live
@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_saved_tokenizer_is_loaded_by_transformers(kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(kind, tmp_path)
    save(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, " a\n b , c .", "Käfer", "<|endoftext|>a" if kind == "bpe" else "a"):
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    if kind == "bpe":
        assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
