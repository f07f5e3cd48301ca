"""Shards of tokens: the same from any number of processes, kept after a kill, remade when damaged."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from texts import words, write_jsonl

from rwkv_jax.corpora import prepare, shards

BPE = str(Path(__file__).parents[1] / "goldens" / "binidx_tokenizer.json")


def test_damaged_shard_is_made_again(tmp_path):
    texts = [words(0).encode(), words(1).encode()]
    encoder = shards.get_tokenizer(BPE)
    path = shards._make(encoder, tmp_path, texts)
    good = path.read_bytes()
    path.write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
    assert shards._make(encoder, tmp_path, texts) == path
    tokens, ends = shards._load(path)
    assert tokens.tolist() == [i for text in texts for i in encoder.encode(text.decode())] and ends[-1] == len(tokens)


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """Builds 40 documents in shards of 2,000 bytes, by threads in place of processes, which take seconds to start."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", lambda number, context, begin: ThreadPoolExecutor(number))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": words(i, 60)} for i in range(40)])

    def build(name, processes):
        monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / name))
        corpus = prepare(source, BPE, processes=processes)
        assert not list(tmp_path.glob(f"{name}/*.shards"))
        return corpus.sha256, [(split.tokens.tolist(), split.starts.tolist()) for split in corpus[4:]]

    return build


def test_shards_of_several_workers_are_those_of_one(small_corpus):
    assert small_corpus("one", 1) == small_corpus("three", 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_that_are_done_are_not_made_again(tmp_path, monkeypatch, small_corpus, processes):
    encoded, numbers, make = [], itertools.count(), shards._make
    tokenizer = type(shards.get_tokenizer(BPE))
    encode = tokenizer.encode_documents
    monkeypatch.setattr(tokenizer, "encode_documents", lambda self, texts: encoded.append(1) or encode(self, texts))

    def killed(*arguments):
        if next(numbers) == 3:
            raise BrokenProcessPool
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_make", killed)
        with pytest.raises(OSError, match=r"^a process that makes tokens was killed"):
            small_corpus("killed", processes)
    done = len(list(tmp_path.glob("killed/*.shards/*.npz")))
    assert done >= 3 and not list(tmp_path.glob("killed/*.partial"))

    encoded.clear()
    resumed, missing = small_corpus("killed", processes), len(encoded)
    encoded.clear()
    assert small_corpus("whole", 1) == resumed and len(encoded) == done + missing


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
    root = str(Path(__file__).parents[2])
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
    while len(whole_shards(cache)) < number:
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)


def whole_shards(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.shards/*.npz") if len(path.name) == 68}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    texts = [{"text": words(i, 2000)} for i in range(150)]
    return write_jsonl(tmp_path_factory.mktemp("source") / "a.jsonl", texts)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, source):
    """(hash, files) of the corpus made here, in one shard."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_JAX_CACHE", str(folder))
        return prepare(source, BPE).sha256, files_of(folder)


@pytest.mark.slow
def test_shards_build_by_two_calls_of_two_processes_at_once(tmp_path, source, cache, expected):
    runs = [start(tmp_path, source, 2) for _ in range(2)]
    assert [finish(run) for run in runs] == [expected[0]] * 2
    assert files_of(cache) == expected[1] != {}
    assert not list(tmp_path.glob("*/*.shards"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_shards_are_kept_after_a_kill(tmp_path, source, cache, expected, processes):
    run = start(tmp_path, source, processes)
    until_shards(cache, run, 5)
    run.kill()
    run.communicate()  # ends only when its processes have: they hold the pipes
    before = whole_shards(cache)
    assert len(before) >= 5

    again = start(tmp_path, source, processes)
    until_shards(cache, again, len(before) + 3)
    after = whole_shards(cache)
    assert {name: after[name] for name in before} == before
    assert (finish(again), files_of(cache)) == expected


@pytest.mark.slow
def test_shards_build_resumes_after_a_killed_process(tmp_path, source, cache, expected):
    run = start(tmp_path, source, 2)
    until_shards(cache, run, 3)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = run.communicate(timeout=100)
    assert run.returncode == 2
    assert err.splitlines()[-1].startswith("error: a process that makes tokens was killed")
    assert len(whole_shards(cache)) >= 3
    assert finish(start(tmp_path, source, 2)) == expected[0]


@pytest.mark.slow
def test_shards_build_resumes_after_a_full_disk(tmp_path, source, cache, expected):
    run = start(tmp_path, source, 1, "cache", 300_000)  # no file may grow beyond; shards are smaller
    _, err = run.communicate(timeout=100)
    assert run.returncode == 2 and err.startswith("error: [Errno 27] File too large")
    assert not list(cache.glob("*.partial")) and whole_shards(cache)
    assert finish(start(tmp_path, source, 1)) == expected[0]
