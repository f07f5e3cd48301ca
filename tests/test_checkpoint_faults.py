"""Checkpoints after faults: damaged files are detected, and a kill at any moment leaves the previous checkpoint."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest
from trees import abstract, bits, files_of, one_line, train_state

from rwkv_jax import checkpoint


def test_restore_of_a_folder_without_checkpoints_is_one_line(tmp_path):
    assert checkpoint.steps(tmp_path / "absent") == []
    with pytest.raises(ValueError, match="no valid checkpoint") as error:
        checkpoint.restore(tmp_path / "absent", train_state())
    one_line(error)


def test_steps_and_restore_skip_a_checkpoint_without_manifest(tmp_path):
    checkpoint.save(tmp_path, 1, train_state(1))
    checkpoint.save(tmp_path, 2, train_state(2))
    (tmp_path / "2" / "manifest.json").unlink()
    assert checkpoint.steps(tmp_path)[-1] == 1
    assert checkpoint.restore(tmp_path, abstract(train_state()))[0] == 1
    checkpoint.save(tmp_path, 2, train_state(3))
    assert checkpoint.restore(tmp_path, abstract(train_state()))[1].step == 3


def test_save_removes_only_the_leftovers_of_a_killed_save(tmp_path):
    for name in ("5.partial", "7.partial.orbax-checkpoint-tmp-1", "4.partial.removed", "9"):
        (tmp_path / name / "d").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, 6, train_state(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "9", "notes.txt"]
    assert checkpoint.steps(tmp_path) == [6]


def test_save_and_restore_accept_a_folder_of_any_name(tmp_path):
    names = ["lr=1e-3,wd=[0.1]", "**", "a\\b", "gs:", "a\nb", "caf\udce9"]
    for name in names:
        checkpoint.save(tmp_path / name, 1, train_state(1))
        step, state = checkpoint.restore(tmp_path / name, abstract(train_state()))
        assert (step, bits(state)) == (1, bits(train_state(1)))
    assert {path.name for path in tmp_path.iterdir()} == set(names)


@pytest.mark.parametrize("lost", ["all", "one"])
def test_save_fails_unless_its_arrays_are_found_afterwards(lost, tmp_path, monkeypatch):
    metadata = ocp.AsyncCheckpointer.metadata

    def forgetful(self, path):
        found = metadata(self, path)
        found.item_metadata.tree.pop("params")
        return SimpleNamespace(item_metadata=None) if lost == "all" else found

    checkpoint.save(tmp_path, 1, train_state(1))
    monkeypatch.setattr(ocp.AsyncCheckpointer, "metadata", forgetful)
    with pytest.raises(OSError, match=r"/2: not saved: .*(Orbax finds no arrays|params.* is absent)") as error:
        checkpoint.save(tmp_path, 2, train_state(2))
    one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_save_reports_its_error_while_its_threads_still_write(tmp_path, monkeypatch):
    """A file that appears in a folder during its deletion is not the cause of the failure."""
    left, remove = [3], shutil.rmtree

    def interrupted(path):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path)

    def full(path):
        raise OSError(errno.ENOSPC, "no space")

    checkpoint.save(tmp_path, 1, train_state(1))
    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(OSError, match=r"/2: not saved: .*no space"):
        checkpoint.save(tmp_path, 2, train_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_verify_detects_every_flipped_byte(tmp_path):
    checkpoint.save(tmp_path, 1, train_state(1))
    rng = np.random.default_rng(0)
    files = files_of(tmp_path, 1)
    assert len(files) > 5
    for file in files * 4:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= rng.integers(1, 256)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged checkpoint") as error:
            checkpoint.verify(tmp_path, 1)
        assert file.name in one_line(error) or file.name == "manifest.json"
        file.write_bytes(whole)
        checkpoint.verify(tmp_path, 1)
    manifest = tmp_path / "1" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b" ", 1))  # the same JSON
    with pytest.raises(ValueError, match=r"damaged checkpoint: manifest.json"):
        checkpoint.verify(tmp_path, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        checkpoint.save(folder, step, train_state(step))
    return folder


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_restore_reports_a_damaged_checkpoint_and_uses_the_previous(damage, two, tmp_path, capfd):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    file = max(files_of(folder, 2), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + (b"" if damage == "truncate" else bytes([whole[-1] ^ 1])))
    step, restored = checkpoint.restore(folder, abstract(train_state()))
    assert step == restored.step == 1
    report = capfd.readouterr().err
    assert report.count("\n") == 1
    assert f"{folder / '2'}: damaged checkpoint: file {file.relative_to(folder / '2')}" in report
    with pytest.raises(ValueError, match="damaged checkpoint"):
        checkpoint.restore(folder, abstract(train_state()), step=2)


def test_restore_uses_the_previous_checkpoint_where_the_disk_fails(two, monkeypatch, capfd):
    read = checkpoint._sha256

    def failing(path):
        if path.is_relative_to(two / "2"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint, "_sha256", failing)
    step, restored = checkpoint.restore(two, abstract(train_state()))
    assert step == restored.step == 1
    assert "Input/output error" in (report := capfd.readouterr().err) and report.count("\n") == 1


def test_restore_of_damaged_checkpoints_alone_is_one_line(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    for step in (1, 2):
        (folder / str(step) / "_METADATA").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"no valid checkpoint \(complete ones: \[1, 2\]\)"):
        checkpoint.restore(folder, abstract(train_state()))


# ------------------------------------------------------------------------------------------ kills


class KilledError(BaseException):
    """Ends the saving thread at once without any cleanup, as a kill would."""


def _killed_at(patch, module, function, name):
    """Makes saving end at its call of `module.function` on a path of this name."""
    call = getattr(module, function)

    def killed(path, *args, **kwargs):
        if Path(path).name == name:
            raise KilledError
        return call(path, *args, **kwargs)

    patch.setattr(module, function, killed)


# moment: (module, function and path of the call where a save is killed, its step, the newest checkpoint afterwards)
KILLS = {
    "before the manifest": (checkpoint, "_write_manifest", "3.partial", 3, 2),
    "while the manifest is written": (checkpoint, "_synchronise", "manifest.json.partial", 3, 2),
    "before the rename": (os, "replace", "3.partial", 3, 2),
    "after the rename": (checkpoint, "_synchronise", "checkpoints", 3, 3),
    "while stale ones are removed": (shutil, "rmtree", "1.partial.removed", 3, 3),
    "while it replaces itself": (shutil, "rmtree", "2.partial.removed", 2, 1),
}  # by SIGKILL, at random: train/test_loop_faults.py


@pytest.mark.parametrize("moment", KILLS)
def test_save_killed_at_any_moment_leaves_the_newest_complete_checkpoint(moment, two, tmp_path, capfd):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    *call, step, newest = KILLS[moment]
    with pytest.MonkeyPatch.context() as patch:
        _killed_at(patch, *call)
        with pytest.raises(KilledError):
            checkpoint.save(folder, step, train_state(step))
    found, restored = checkpoint.restore(folder, abstract(train_state()))
    assert found == newest and bits(restored) == bits(train_state(newest))
    assert capfd.readouterr().err == ""
    checkpoint.save(folder, newest + 1, train_state(newest + 1))
    assert sorted(path.name for path in folder.iterdir()) == [str(newest), str(newest + 1)]
