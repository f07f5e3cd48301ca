"""Public corpora, downloaded from a local server that runs in a process of its own."""

import hashlib
import io
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
from tqdm import tqdm

from rwkv_jax.corpora import named, prepare

BAR = partial(tqdm, disable=True)

# Ways to serve the same file: whole, by ranges, never more than 1,000 bytes a connection, or nothing but a beginning.
SERVER = """
import http.server, pathlib, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        _, how, name = self.path.split("/")
        data = pathlib.Path(sys.argv[1], name).read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if how != "whole" else 0
        with open(sys.argv[2], "a") as log:
            print(how, self.headers.get("Range"), file=log)
        if begin and how == "stuck":
            data = data[:begin]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin if how != "stuck" else 10**6))
        self.end_headers()
        self.wfile.write(data[begin : begin + 1000 if how in ("short", "stuck") else None])

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Served:
    def __init__(self, folder, log, port):
        self.folder, self.log, self.port = folder, log, port

    def download(self, how, name, data):
        (self.folder / name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        return named.Download(f"http://127.0.0.1:{self.port}/{how}/{name}", len(data), sha256)

    def requests(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, log = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("log") / "requests"
    with subprocess.Popen([sys.executable, "-c", SERVER, folder, log], stdout=subprocess.PIPE, text=True) as process:
        yield Served(folder, log, int(process.stdout.readline()))
        process.terminate()


@pytest.fixture
def served(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for path in (*server.folder.iterdir(), server.log):
        path.unlink(missing_ok=True)
    return server


DATA = np.random.default_rng(0).bytes(4500)


@pytest.mark.parametrize("how", ["whole", "ranges", "short"])
def test_fetch_downloads_a_file_once(served, tmp_path, how):
    download = served.download(how, "a.bin", DATA)
    assert named.fetch(download, tmp_path / "to", BAR).read_bytes() == DATA
    assert len(served.requests()) == (5 if how == "short" else 1)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["a.bin"]
    named.fetch(download, tmp_path / "to", BAR)
    assert len(served.requests()) == (5 if how == "short" else 1)


@pytest.mark.parametrize(("how", "begin"), [("ranges", 1234), ("whole", 1234), ("ranges", len(DATA))])
def test_fetch_resumes_a_partial_download(served, tmp_path, how, begin):
    download = served.download(how, "a.bin", DATA)
    (tmp_path / "a.bin.part").write_bytes(DATA[:begin])
    assert named.fetch(download, tmp_path, BAR).read_bytes() == DATA
    assert served.requests() == ([f"{how} bytes={begin}-"] if begin < len(DATA) else [])


def test_fetch_keeps_what_a_broken_transfer_brought(served, tmp_path):
    download = served.download("stuck", "a.bin", DATA)
    with pytest.raises(OSError) as raised:
        named.fetch(download, tmp_path / "to", BAR)
    assert str(raised.value) == (
        f"cannot download {download.url}: the connection ended early; 1000 of 4500 bytes are here: "
        f"try again, or put the file at {tmp_path / 'to' / 'a.bin'}"
    )
    assert (tmp_path / "to" / "a.bin.part").read_bytes() == DATA[:1000]
    whole = download._replace(url=download.url.replace("stuck", "ranges"))
    assert named.fetch(whole, tmp_path / "to", BAR).read_bytes() == DATA
    assert served.requests()[-1] == "ranges bytes=1000-"


def test_fetch_refuses_a_wrong_checksum(served, tmp_path):
    download = served.download("ranges", "a.bin", DATA)
    (served.folder / "a.bin").write_bytes(DATA[:-1] + b"?")
    with pytest.raises(
        ValueError, match=r"a\.bin\.part, now removed, is not http.* as published: SHA-256 [0-9a-f]{64}"
    ):
        named.fetch(download, tmp_path / "to", BAR)
    assert not list((tmp_path / "to").iterdir())


def test_fetch_takes_a_file_that_is_already_there(served, tmp_path):
    download = served.download("ranges", "a.bin", DATA)
    (tmp_path / "a.bin").write_bytes(DATA)
    assert named.fetch(download, tmp_path, BAR).read_bytes() == DATA
    (tmp_path / "a.bin").write_bytes(DATA[1:])
    with pytest.raises(ValueError, match=r"a\.bin is not http.* as published: SHA-256"):
        named.fetch(download, tmp_path, BAR)
    assert (tmp_path / "a.bin").read_bytes() == DATA[1:] and served.requests() == []


@pytest.mark.parametrize(("address", "problem"), [("127.0.0.1:1", "Connection refused"), ("nowhere.invalid", "")])
def test_prepare_without_a_network_is_one_line(served, tmp_path, monkeypatch, address, problem):
    download = named.Download(f"http://{address}/enwik8.zip", 100, "0" * 64)
    monkeypatch.setitem(named.NAMED, "enwik8", [download])
    with pytest.raises(OSError) as raised:
        prepare("enwik8")
    line = str(raised.value)
    assert line.startswith(f"cannot download http://{address}/enwik8.zip: ") and "\n" not in line and problem in line
    target = tmp_path / "cache" / "downloads" / "enwik8.zip"
    assert line.endswith(f"; 0 of 100 bytes are here: try again, or put the file at {target}")


def test_fetch_of_a_missing_page_is_one_line(served, tmp_path):
    download = served.download("ranges", "a.bin", DATA)
    (served.folder / "a.bin").unlink()
    with pytest.raises(OSError, match=r"^cannot download http.*; 0 of 4500 bytes are here"):
        named.fetch(download, tmp_path / "to", BAR)


def archive(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return out.getvalue()


def texts_of(split):
    return [bytes(part[1:]) for part in np.split(split.tokens, split.starts[1:])]


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_prepare_reads_a_zipped_file(served, monkeypatch, name):
    text = b"0123456789" * 200
    download = served.download("short", f"{name}.zip", archive({name: text}))
    monkeypatch.setitem(named.NAMED, name, [download])
    corpus = prepare(name)
    assert corpus.name == name
    assert [texts_of(split) for split in corpus[4:]] == [[text[:1800]], [text[1800:1900]], [text[1900:]]]
    requests = len(served.requests())
    assert prepare(name).sha256 == corpus.sha256 and len(served.requests()) == requests


def test_prepare_keeps_the_splits_of_wikitext(served, monkeypatch):
    parts = {part: f" \n = {part} = \n".encode() * 9 for part in ("train", "valid", "test")}
    data = archive({f"wikitext-103-raw/wiki.{part}.raw": text for part, text in parts.items()})
    monkeypatch.setitem(named.NAMED, "wikitext-103", [served.download("whole", "wikitext-103-raw-v1.zip", data)])
    assert [texts_of(split) for split in prepare("wikitext-103")[4:]] == [[text] for text in parts.values()]


def test_prepare_splits_tinystories_by_story(served, monkeypatch):
    stories = [f"Story {i}.\n\nThe end." for i in range(200)]
    data = "\n<|endoftext|>\n".join(stories[:190]).encode(), "\n<|endoftext|>\n".join(stories[190:]).encode()
    downloads = [served.download("whole", f"{i}.txt", text) for i, text in enumerate(data)]
    monkeypatch.setitem(named.NAMED, "tinystories", downloads)
    train, valid, test = ([text.decode() for text in texts_of(split)] for split in prepare("tinystories")[4:])
    assert valid == stories[190:]
    assert sorted(train + test) == sorted(stories[:190]) and 2 <= len(test) < 25


def test_named_downloads_have_address_size_and_checksum():
    for downloads in named.NAMED.values():
        for url, num_bytes, sha256 in downloads:
            assert url.startswith("https://") and num_bytes > 1e7 and len(bytes.fromhex(sha256)) == 32
