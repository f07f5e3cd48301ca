"""Users' paths, atomic writes of files and folders, and the guarded reader of JSON."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from weights import one_line

from rwkv_jax import files

ROOT = Path(__file__).parents[1]


def test_user_path_takes_text_and_path_objects_and_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {"~/a": tmp_path / "a", "~": tmp_path, "b/~": Path("b/~"), "~nobody.pth": Path("~nobody.pth")}
    assert {given: files.user_path(given) for given in expected} == expected
    assert {given: files.user_path(Path(given)) for given in expected} == expected


def test_num_bytes_is_that_of_a_file_or_of_all_files_in_a_folder(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a").write_bytes(b"1" * 5)
    (tmp_path / "folder" / "inner" / "b").write_bytes(b"1" * 7)
    found = [files.num_bytes(tmp_path / name) for name in ("folder/a", "folder", "none")]
    assert found == [5, 12, 0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": ', "x.json: not JSON: Expecting value"),
        (b"\x80abc", "x.json: not JSON: .*codec can't decode"),
        (b"[" * 100_000, "x.json: not JSON: "),
        (b'{"a": ' + b"[" * 100 + b"1" + b"]" * 100 + b"}", "x.json: JSON nested more than 100 deep"),
        (b"[1, 2]", "x.json: holds a JSON list, expected an object"),
    ],
)
def test_read_json_names_a_file_without_an_object(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with one_line(message):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": [1, null]}')
    assert files.read_json(tmp_path / "x.json") == {"a": [1, None]}


def test_read_json_accepts_nesting_up_to_its_limit(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100 + "1" + "]" * 100)
    assert files.read_json(tmp_path / "x.json", list)
    with one_line("holds a JSON list, expected an object"):
        files.read_json(tmp_path / "x.json")


def test_to_json_writes_ascii_and_null_for_numbers_that_are_not_finite():
    value = {"a": np.float32("nan"), "b": [np.inf, (1, -np.inf)], "c": np.arange(2), "d": "é\udce4", "e": True}
    text = files.to_json(value)
    assert text == r'{"a": null, "b": [null, [1, null]], "c": [0, 1], "d": "\u00e9\udce4", "e": true}'
    assert json.loads(text)["d"] == "é\udce4"


def test_read_json_is_the_only_reader_of_json_in_the_sources():
    """Exceptions: `json.loads(json.dumps(...))` reads no file, and the output of our own child processes is
    trusted."""
    pattern = re.compile(r"json\.loads?\((?!json\.dumps|\w+\.(stdout\.)?splitlines)")
    sources = [path for folder in ("rwkv_jax", "configs", "experiments") for path in (ROOT / folder).rglob("*.py")]
    assert {path.name for path in sources if pattern.search(path.read_text())} == {"files.py"}


@pytest.mark.parametrize("name", ["a*[b]?", "\udce4", "c:d@e", "\\"])
def test_plainly_named_gives_a_folder_of_any_name_a_plain_one(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    with files.plainly_named(folder) as plain:
        assert re.fullmatch(r"[\w/. -]+", str(plain)) and str(plain).isascii()
        (plain / "x").touch()
    assert (folder / "x").exists() and not plain.exists()
    with files.plainly_named(tmp_path) as plain:
        assert plain == tmp_path


def test_written_replaces_a_file_atomically(tmp_path):
    path = tmp_path / "x"
    for content in (b"first", b"second"):
        with files.written(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with pytest.raises(RuntimeError), files.written(path) as file:
        file.write(b"third")
        raise RuntimeError
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]
    with (
        one_line(r"absent: no such folder; cannot write x there", FileNotFoundError),
        files.written(tmp_path / "absent/x"),
    ):
        pass


def test_written_and_written_folder_follow_links(tmp_path):
    (tmp_path / "disk" / "old").mkdir(parents=True)
    for name, target in (("file", "a"), ("folder", "old"), ("new", "absent")):
        (tmp_path / name).symlink_to(tmp_path / "disk" / target)
    files.check_output(tmp_path / "file")
    with files.written(tmp_path / "file") as file:
        file.write(b"content")
    for name in ("folder", "new"):
        with files.written_folder(tmp_path / name) as folder:
            (folder / "inside").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "file", "folder", "new"]
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "new"))
    found = sorted(path.relative_to(tmp_path / "disk").as_posix() for path in tmp_path.rglob("disk/**/*"))
    assert found == ["a", "absent", "absent/inside", "old", "old/inside"]
    assert (tmp_path / "disk" / "a").read_bytes() == b"content"
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "a")
    with one_line("nowhere: no such folder; cannot write a there", FileNotFoundError):
        files.check_output(tmp_path / "lost")


def test_written_never_replaces_a_folder_or_a_device(tmp_path):
    """`check_output` refuses them, too, without touching them."""
    for taken in (tmp_path, Path("/dev/null")):
        for use in (files.check_output, lambda path: files.written(path).__enter__()):
            with one_line(f"{taken} is a folder or a device", FileExistsError):
                use(taken)
    files.check_output(tmp_path / "x")
    files.check_output_folder(tmp_path / "x/y/z")
    with one_line("cannot write: Not a directory: '/dev/null/x'", NotADirectoryError):
        files.check_output_folder("/dev/null/x")
    assert not list(tmp_path.iterdir())


def test_written_folder_replaces_a_folder_atomically(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    for name in ("first", "second"):
        with files.written_folder(folder) as new:
            (new / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]

    rename = Path.rename

    def fails_at_the_new_one(path, target):
        if path.suffix == ".tmp":
            raise RuntimeError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_new_one)
    with pytest.raises(RuntimeError), files.written_folder(folder) as new:
        (new / "third").touch()
    assert [path.name for path in folder.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [folder]
