"""Checkpoints: what is saved comes back bit for bit, on any devices; saves run behind the caller, one at a time."""

import json
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from trees import abstract, bits, files_of, one_line, train_state

from rwkv_jax import checkpoint


def test_restore_is_bit_exact(tmp_path, capfd):
    state = train_state(7)
    checkpoint.save(tmp_path / "checkpoints", 7, state)
    step, restored = checkpoint.restore(tmp_path / "checkpoints", abstract(state))
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
    assert capfd.readouterr() == ("", "")


def test_save_holds_the_values_of_its_step_though_later_steps_take_its_buffers(tmp_path, monkeypatch):
    """40 MB, so that the steps run while they are written; and the manifest waits for them, however fast the disk."""
    stepped, manifest = threading.Event(), checkpoint._write_manifest
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda path: stepped.wait(60) and manifest(path))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.device_put({f"w{i}": np.full(1_000_000, i, np.float32) for i in range(10)})
    state = overwrite(overwrite(state))  # compiled, and an output of a step as in training
    saving = checkpoint.save_async(tmp_path, 1, state)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    assert not saving.done() and checkpoint.steps(tmp_path) == []
    assert np.asarray(state["w7"])[0] == 12
    stepped.set()
    saving.result()
    restored = checkpoint.restore(tmp_path, state)[1]
    assert all((np.asarray(restored[f"w{i}"]) == i + 2).all() for i in range(10))


def test_save_waits_for_the_one_before(tmp_path):
    saves = [checkpoint.save_async(tmp_path, step, train_state(step), keep=3) for step in (1, 2, 3)]
    assert saves[0].done() and saves[1].done()
    checkpoint.wait()
    assert saves[2].done() and checkpoint.steps(tmp_path) == [1, 2, 3]


def test_save_keeps_the_newest_and_restore_takes_a_named_step(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, train_state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2"]
    step, restored = checkpoint.restore(tmp_path, abstract(train_state()), step=2)
    assert step == restored.step == 2
    with pytest.raises(ValueError, match=r"1: no complete checkpoint; .* has steps \[2, 10\]"):
        checkpoint.restore(tmp_path, abstract(train_state()), step=1)


def test_save_of_an_earlier_step_replaces_it_and_drops_later_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, train_state(step), keep=3)
    checkpoint.save(tmp_path, 2, train_state(5), keep=3)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.restore(tmp_path, abstract(train_state()))[1].step == 5


def test_save_that_keeps_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 1, train_state(1), keep=0)


def test_manifest_lists_every_file_and_is_written_last(tmp_path):
    checkpoint.save(tmp_path, 1, train_state(1))
    manifest = tmp_path / "1" / "manifest.json"
    recorded = json.loads(manifest.read_bytes())
    others = [file for file in files_of(tmp_path, 1) if file != manifest]
    assert sorted(recorded) == sorted(str(file.relative_to(tmp_path / "1")) for file in others)
    assert manifest.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in others)


def test_part_is_restored_without_the_optimizer(tmp_path):
    state = train_state(3)
    checkpoint.save(tmp_path, 3, state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    step, params = checkpoint.restore(tmp_path, shapes, key="params")
    assert step == 3
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    assert bits(params) == bits(state.params)
    with pytest.raises(ValueError, match=r"parameters\.\S+ is absent in the checkpoint"):
        checkpoint.restore(tmp_path, shapes, key="parameters")


def test_leaf_unlike_the_expected_one_is_named(tmp_path):
    state = train_state(1)
    checkpoint.save(tmp_path, 1, state)
    wider = abstract(train_state(1, width=9))
    with pytest.raises(ValueError, match=r"is \w+\[2, 8\] in the checkpoint, expected \w+\[2, 9\]") as error:
        checkpoint.restore(tmp_path, wider)
    one_line(error)
    like = abstract(state)
    wide = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    message = r"params\.head\.kernel is bfloat16\[8, 16\] in the checkpoint, expected float32\[8, 16\]"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, like.replace(params=like.params | {"head": wide}))
    more = like.replace(params=like.params | {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(ValueError, match=r"params\.bias is absent in the checkpoint, expected float32\[3\]"):
        checkpoint.restore(tmp_path, more)
    fewer = like.replace(params={"emb": like.params["emb"], "blocks": like.params["blocks"]})
    with pytest.raises(ValueError, match=r"params\.head\.kernel is .* expected no such leaf"):
        checkpoint.restore(tmp_path, fewer)


def test_restore_places_arrays_on_four_devices_and_back_on_one(tmp_path):
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    tree = {"w": np.arange(48, dtype=np.float32).reshape(6, 8)}
    checkpoint.save(tmp_path, 1, jax.device_put(tree))
    step, four = checkpoint.restore(tmp_path, {"w": jax.ShapeDtypeStruct((6, 8), np.float32, sharding=split)})
    assert step == 1 and four["w"].sharding == split
    assert {shard.data.shape for shard in four["w"].addressable_shards} == {(6, 2)}
    assert bits(four) == bits(tree)
    checkpoint.save(tmp_path, 2, jax.device_put({"w": tree["w"] + 1}, split))
    step, one = checkpoint.restore(tmp_path, abstract(tree))
    assert step == 2 and len(one["w"].devices()) == 1
    assert bits(one) == bits({"w": tree["w"] + 1})


def test_orbax_logs_warnings_only_and_others_keep_their_logs(tmp_path, caplog, monkeypatch):
    absl, tree = logging.getLogger("absl"), {"a": np.zeros(3)}

    def logged():
        caplog.clear()
        with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, logger="absl"):
            absl.info("mine")
            checkpoint.save(tmp_path, 1, tree)
            checkpoint.restore(tmp_path, tree)
        return [record.getMessage() for record in caplog.records if record.name == "absl"]

    assert logged() == ["mine"]
    (kept,) = [f for f in absl.filters if f.__module__ == checkpoint.__name__]
    record = lambda level, exc_info=None: logging.LogRecord("absl", level, "/a/orbax/b.py", 1, "", (), exc_info)
    assert kept(record(logging.WARNING)) and not kept(record(logging.INFO))
    assert not kept(record(logging.ERROR, (ValueError, ValueError(), None)))
    monkeypatch.setattr(absl, "filters", [])
    assert len(logged()) > 10  # what Orbax says without it
