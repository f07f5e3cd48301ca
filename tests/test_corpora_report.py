"""`python -m rwkv_jax.corpora`, and tokens made in several processes that may be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.corpora import __main__ as command
from rwkv_jax.corpora import prepare, shards

GOLDENS = Path(__file__).with_name("goldens")
BPE = str(GOLDENS / "binidx_tokenizer.json")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prose(seed, words=200):
    letters = np.random.default_rng(seed).choice(list("abcdefgh"), (words, 5))
    return " ".join("".join(word) for word in letters)


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_what_a_corpus_holds(tmp_path, capsys):
    texts = [prose(i) for i in range(100)]
    texts += [texts[0], texts[1]] + [prose(1000 + i, 30) + texts[i] for i in range(10, 15)] + ["short", "brief"]
    source = jsonl(tmp_path / "a.jsonl", texts)
    assert command.main([source, "--json", f"--tokenizer={BPE}", "--processes=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    corpus = prepare(source, BPE)
    assert (found["name"], found["sha256"], found["vocab_size"]) == ("a.jsonl", corpus.sha256, 264)
    rows = [found[name] for name in ("train", "valid", "test")]
    assert [row["tokens"] for row in rows] == [len(split.tokens) for split in corpus[4:]]
    assert sum(row["documents"] for row in rows) == len(texts)
    assert sum(row["bytes"] for row in rows) == sum(len(text.encode()) for text in texts)
    assert (sum(row["copies"] for row in rows), sum(row["near_copies"] for row in rows)) == (2, 5)
    text_tokens = rows[0]["tokens"] - rows[0]["documents"]
    assert rows[0]["bytes_per_token"] == rows[0]["bytes"] / text_tokens

    assert command.main([source, f"--tokenizer={BPE}", "--processes=1"]) == 0
    first, header, train, _, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("a.jsonl: tokenizer ") and header.split()[0] == "tokens"
    assert train.split()[:3] == ["train", f"{rows[0]['tokens']:,}", str(rows[0]["documents"])]


def test_megatron_files_from_the_command_line(tmp_path, capsys):
    arguments = [str(GOLDENS / "binidx.jsonl"), f"--tokenizer={BPE}", f"--write={tmp_path / 'own'}", "--processes=1"]
    assert command.main(arguments) == 0
    assert "5 documents written" in capsys.readouterr().out
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"own{ending}").read_bytes() == (GOLDENS / f"binidx{ending}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.bin", "own.idx"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "error: no corpus nowhere: expected"),
        (["stdlib", "--processes=0"], "error: processes is 0, expected at least 1"),
        (["stdlib", "--tokenizer=nowhere.json"], "error: no tokenizer file nowhere.json"),
        (["a.jsonl", "--write=b", "--prompt=q"], "error: --write with --prompt"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, line):
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


RUN = """
import sys
from rwkv_jax.corpora import __main__, shards

if __name__ == "__main__":
    shards.SHARD_BYTES = 50_000
    if len(sys.argv) > 5:
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), resource.RLIM_INFINITY))
    sys.exit(__main__.main([sys.argv[1], "--tokenizer", sys.argv[2], "--processes", sys.argv[3], "--json"]))
"""


def start(tmp_path, source, processes, name="cache", *limit):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "RWKV_JAX_CACHE": str(tmp_path / name)}
    command = [sys.executable, "-W", "error", str(script), source, BPE, str(processes), name, *map(str, limit)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run):
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return json.loads(out)["sha256"]


def files_of(cache):
    return {path.name: path.read_bytes() for path in cache.glob("*/*.*") if path.suffix in (".bin", ".starts")}


def until_shards(cache, run, number):
    while len(list(cache.glob("*.shards/*.npz"))) < number:
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)


def whole_shards(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.shards/*.npz") if len(path.name) == 68}


@pytest.fixture
def source(tmp_path):
    return jsonl(tmp_path / "a.jsonl", [prose(i, 2000) for i in range(250)])


@pytest.mark.slow
def test_processes_make_the_same_tokens(tmp_path, source):
    serial, parallel = start(tmp_path, source, 1, "one"), start(tmp_path, source, 2, "two")
    assert finish(serial) == finish(parallel)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") != {}
    assert not list(tmp_path.glob("*/*.shards"))


@pytest.mark.slow
def test_two_at_once(tmp_path, source, cache):
    runs = [start(tmp_path, source, 2) for _ in range(2)]
    assert finish(runs[0]) == finish(runs[1])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_done_before_a_kill_is_not_done_again(tmp_path, source, cache, processes):
    run = start(tmp_path, source, processes)
    until_shards(cache, run, 5)
    run.kill()
    run.communicate()  # ends only when its processes have: they hold the pipes
    before = whole_shards(cache)
    assert len(before) >= 4

    again = start(tmp_path, source, processes)
    until_shards(cache, again, len(before) + 3)
    after = whole_shards(cache)
    assert {name: after[name] for name in before} == before
    assert finish(again) == finish(start(tmp_path, source, 1, "other"))
    assert files_of(cache) == files_of(tmp_path / "other")


@pytest.mark.slow
def test_a_killed_process_is_one_line_and_the_next_call_goes_on(tmp_path, source, cache):
    run = start(tmp_path, source, 2)
    until_shards(cache, run, 3)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = run.communicate(timeout=100)
    assert run.returncode == 2
    assert err.splitlines()[-1].startswith("error: a process that makes tokens was killed")
    assert len(whole_shards(cache)) >= 3
    assert finish(start(tmp_path, source, 2)) == finish(start(tmp_path, source, 1, "other"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(tmp_path, source, cache):
    run = start(tmp_path, source, 1, "cache", 300_000)  # no file may grow beyond; shards are smaller
    _, err = run.communicate(timeout=100)
    assert run.returncode == 2 and err.startswith("error: [Errno 27] File too large")
    assert not list(cache.glob("*.partial")) and whole_shards(cache)
    assert finish(start(tmp_path, source, 1)) == finish(start(tmp_path, source, 1, "other"))


def test_a_damaged_shard_is_made_again(tmp_path):
    texts = [prose(0).encode(), prose(1).encode()]
    encoder = shards.get_tokenizer(BPE)
    path = shards._make(encoder, tmp_path, texts)
    good = path.read_bytes()
    path.write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
    assert shards._make(encoder, tmp_path, texts) == path
    tokens, ends = shards._load(path)
    assert tokens.tolist() == [i for text in texts for i in encoder.encode(text.decode())] and ends[-1] == len(tokens)
