"""The cache of corpora: built once, rebuilt when damaged or outdated, complete after a kill."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from texts import documents, prose, splits_of

from rwkv_jax.data import cache as folders
from rwkv_jax.data import cache_dir, prepare
from rwkv_jax.data.tokenizers import get_tokenizer


def test_prepare_rebuilds_the_cache_for_a_changed_file_or_tokenizer(tmp_path, bpe):
    path = tmp_path / "text.txt"
    path.write_text(prose(0))
    first = prepare(str(path))
    file = Path(first.train.tokens.filename)
    written = file.stat()
    assert prepare(str(path)).sha256 == first.sha256
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "built once"
    (tmp_path / "same content.txt").write_text(prose(0))
    assert prepare(str(tmp_path / "same content.txt")).sha256 == first.sha256
    path.write_text(prose(0)[::-1])
    second = prepare(str(path))
    assert documents(second.train)["text.txt"] == path.read_bytes()[: second.train.num_bytes]
    assert second.sha256 != first.sha256

    own = tmp_path / "tokenizer.json"
    own.write_text(Path(bpe).read_text())
    with_bpe = prepare(str(path), str(own))
    own.write_text(Path(bpe).read_text().replace("<|endoftext|>", "<|end|>"))
    assert prepare(str(path), str(own)).sha256 != with_bpe.sha256


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (Path.unlink, "train.bin"),
        (flip_a_bit, "test.bin"),
        (flip_a_bit, "valid.starts"),
        (flip_a_bit, "record.json"),
        (flip_a_bit, "SHA256SUMS"),
    ],
)
def test_prepare_rebuilds_a_damaged_cache_with_a_warning(tmp_path, caplog, damage, name):
    (tmp_path / "text.txt").write_text(prose(0))
    first = prepare(str(tmp_path / "text.txt"))
    expected = [documents(split) for split in splits_of(first)]
    folder = Path(first.train.tokens.filename).parent
    check = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert check.returncode == 0 and check.stdout.count(": OK") == len(list(folder.iterdir())) - 1
    damage(folder / name)
    again = prepare(str(tmp_path / "text.txt"))
    assert [documents(split) for split in splits_of(again)] == expected
    assert caplog.messages == [f"{folder} is damaged: rebuilding it"]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("RWKV_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "rwkv_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "rwkv_jax"


def test_cache_folder_is_built_by_one_of_two_callers(cache, caplog):
    """The lock belongs to an open file, so two threads exclude each other as two processes do."""
    made, begun, go_on = [], threading.Event(), threading.Event()

    def make(folder):
        begun.set()
        assert go_on.wait(60)
        (folder / "train.bin").write_bytes(b"tokens")
        made.append(folder)
        return {"number": len(made)}

    records = []
    call = lambda: records.append(folders.made(cache / "corpus", make))
    first, second = threading.Thread(target=call), threading.Thread(target=call)
    first.start()
    assert begun.wait(60)
    assert not (cache / "corpus").exists()  # visible only once it is complete
    second.start()
    deadline = time.monotonic() + 60
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.001)
    go_on.set()
    first.join()
    second.join()
    assert records == [{"number": 1}] * 2 and len(made) == 1
    assert caplog.messages == [f"waiting for another process that prepares a corpus in {cache}"]


BUILD = """
import sys
from rwkv_jax.data import prepare
prepare(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_prepare_rebuilds_after_a_kill_and_removes_the_partial_folder(tmp_path, cache, bpe):
    source = tmp_path / "text.txt"
    source.write_text(prose(0, lines=60_000))
    build = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", BUILD, source, bpe],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    while not any(tokens.stat().st_size for tokens in cache.glob("*.partial/train.bin")):
        assert build.poll() is None, build.communicate()
        time.sleep(0.001)
    build.kill()
    build.communicate()
    [leftover] = cache.glob("*.partial")
    assert (leftover / "train.bin").exists() and not (leftover / "SHA256SUMS").exists()

    # The next build removes it, whichever corpus it builds.
    (tmp_path / "other.txt").write_text(prose(1))
    prepare(str(tmp_path / "other.txt"))
    assert not list(cache.glob("*.partial"))

    corpus = prepare(str(source), bpe)
    assert sum(split.num_bytes for split in splits_of(corpus)) == source.stat().st_size
    ids = np.concatenate([split.tokens[1:] for split in splits_of(corpus)])
    assert get_tokenizer(bpe).decode(ids) == source.read_text()
