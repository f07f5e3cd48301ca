"""Named public corpora, downloaded from a server on this machine."""

import gc
import hashlib
import http.server
import io
import shutil
import threading
import zipfile

import pytest
from texts import parts, prose, splits_of

from rwkv_jax.data import named, prepare


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; a path below /cut/ is answered with fewer bytes than announced."""

    def do_GET(self):
        _, how, name = self.path.split("/")
        self.server.requests.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:9] if how == "cut" else data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def running():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def serve(running, monkeypatch):
    """A function that redirects a named corpus to the server and returns the list of the requests it receives."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running.files, running.requests = {}, []

    def serve(corpus, files, how="whole"):
        running.files |= files
        address = f"http://127.0.0.1:{running.server_port}/{how}"
        digests = {f"{address}/{name}": hashlib.sha256(data).hexdigest() for name, data in files.items()}
        monkeypatch.setitem(named.NAMED, corpus, digests)
        return running.requests

    return serve


def archive(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return out.getvalue()


TEXT = b"0123456789" * 200


def test_prepare_downloads_and_unpacks_once_unless_it_is_damaged(serve, cache, caplog):
    requests = serve("enwik8", {"enwik8.zip": archive({"enwik8": TEXT})})
    corpus = prepare("enwik8")
    assert corpus.name == "enwik8"
    assert [parts(split) for split in splits_of(corpus)] == [[TEXT[:1800]], [TEXT[1800:1900]], [TEXT[1900:]]]
    assert prepare("enwik8").sha256 == corpus.sha256
    assert len(prepare("enwik8", "characters").train.tokens) == 1801
    assert requests == ["enwik8.zip"]

    (cache / "downloads" / "enwik8" / "enwik8").write_bytes(TEXT[:-1] + b"?")
    for path in cache.glob("enwik8-*/train.bin"):
        path.unlink()
    assert prepare("enwik8").sha256 == corpus.sha256 and len(requests) == 2
    assert f"{cache / 'downloads' / 'enwik8'} is damaged: rebuilding it" in caplog.messages


def test_prepare_keeps_the_splits_of_wikitext(serve):
    texts = {part: f" \n = {part} = \n".encode() * 9 for part in ("train", "valid", "test")}
    data = archive({f"wikitext-103-raw/wiki.{part}.raw": text for part, text in texts.items()})
    serve("wikitext-103", {"wikitext-103-raw-v1.zip": data})
    assert [parts(split) for split in splits_of(prepare("wikitext-103"))] == [[text] for text in texts.values()]


def test_prepare_splits_tinystories_by_story(serve, monkeypatch):
    monkeypatch.setattr("rwkv_jax.data.text._BLOCK_BYTES", 50)  # stories cross the borders of blocks
    stories = [f"Story {i}.\n\nThe end.".encode() for i in range(200)]
    train, valid = (b"\n<|endoftext|>\n".join(part) for part in (stories[:190], stories[190:]))
    serve("tinystories", {"train.txt": train, "valid.txt": valid})
    train, valid, test = map(parts, splits_of(prepare("tinystories")))
    assert valid == stories[190:]
    assert sorted(train + test) == sorted(stories[:190]) and 2 <= len(test) < 25


def test_prepare_sorts_classic_books_by_the_hash_of_their_path(serve, cache, running, monkeypatch):
    by_hash = sorted(
        (f"Author {i}/Title.md" for i in range(8)), key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    raw = {name: prose(i).replace("\n", "\r\n") + " \r\n" for i, name in enumerate(by_hash)}
    raw |= {by_hash[2]: "a story", "Samuel Richardson/Clarissa.md": prose(9)}
    text = {name: raw[name].replace("\r\n", "\n").rstrip().encode() + b"\n\n" for name in by_hash}
    expected = {"test": by_hash[:2], "valid": by_hash[3:4], "train": by_hash[4:7]}  # the last hash is not needed
    sha256 = {split: hashlib.sha256(b"".join(map(text.get, names))).hexdigest() for split, names in expected.items()}
    size = {split: sum(len(text[name]) for name in names[:-1]) + 1 for split, names in expected.items()}
    monkeypatch.setattr(named, "_BOOKS", {split: (size[split], sha256[split]) for split in expected})
    monkeypatch.setattr(named, "_BOOK_CHARACTERS", 100)
    serve("classic-books", {"books.zip": archive({f"books-abc/{name}": text for name, text in raw.items()})})

    monkeypatch.setitem(named.NAMED, "classic-books", dict.fromkeys(named.NAMED["classic-books"]))  # digest unknown

    corpus = prepare("classic-books")
    for split in splits_of(corpus):
        assert parts(split) == [text[name] for name in expected[split.names[0].partition("/")[0]]]
    assert corpus.valid.names == (f"valid/002 {by_hash[3].replace('/', ' - ')}",)
    assert prepare(str(cache / "downloads" / "classic-books")).sha256 == corpus.sha256

    monkeypatch.setattr(named, "_BOOKS", named._BOOKS | {"valid": (1, "0" * 64)})
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=f"SHA-256 of classic-books, valid, is {sha256['valid']}, expected 0000"):
        prepare("classic-books")
    assert not (cache / "downloads" / "classic-books").exists()
    running.files["books.zip"] = b"a page of a proxy"
    with pytest.raises(OSError, match=r"^cannot download .*books\.zip: File is not a zip file; for a machine without"):
        prepare("classic-books")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # pooch leaves the connection of a failed transfer open
@pytest.mark.parametrize("how", ["no connection", "no file", "cut", "wrong checksum"])
def test_prepare_reports_a_failed_download_in_one_line_and_leaves_no_files(serve, cache, running, monkeypatch, how):
    serve("enwik8", {"enwik8.zip": archive({"enwik8": TEXT})}, how="cut" if how == "cut" else "whole")
    [(url, sha256)] = named.NAMED["enwik8"].items()
    if how == "no file":
        running.files.clear()
    if how == "wrong checksum":
        running.files["enwik8.zip"] += b"?"
    if how == "no connection":
        url = "http://127.0.0.1:1/a.zip"
        monkeypatch.setitem(named.NAMED, "enwik8", {url: sha256})
    with pytest.raises((OSError, ValueError)) as raised:
        prepare("enwik8")
    line = str(raised.value)
    del raised
    gc.collect()  # closes the connection while its warning is ignored
    folder = cache / "downloads" / "enwik8"
    assert "\n" not in line
    if how == "wrong checksum":
        assert line.startswith("SHA256 hash of downloaded file (enwik8.zip) does not match")
    else:
        assert line.startswith(f"cannot download {url}: ")
        assert line.endswith(f"; for a machine without a network, copy the folder {folder} from one that has it")
    assert [path.name for path in (cache / "downloads").iterdir()] == ["lock"]
