"""Paths of a user, files and folders that appear whole or not at all, and the guarded reader of JSON."""

from pathlib import Path

import pytest
from weights import one_line

from rwkv_jax import files


def test_user_path_takes_text_and_path_objects_and_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {"~/a": tmp_path / "a", "~": tmp_path, "b/~": Path("b/~"), "~nobody.pth": Path("~nobody.pth")}
    assert {given: files.user_path(given) for given in expected} == expected
    assert {given: files.user_path(Path(given)) for given in expected} == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": ', "x.json: no JSON: Expecting value"),
        (b"\x80abc", "x.json: no JSON: .*codec can't decode"),
        (b"[" * 100_000, "x.json: no JSON: "),
        (b"[1, 2]", "x.json: holds a JSON list, expected an object"),
    ],
)
def test_read_json_names_the_file_that_holds_no_object(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with one_line(message):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": [1, null]}')
    assert files.read_json(tmp_path / "x.json") == {"a": [1, None]}


def test_written_file_appears_whole_or_not_at_all(tmp_path):
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


def test_written_folder_replaces_the_old_one_whole_or_not_at_all(tmp_path, monkeypatch):
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
