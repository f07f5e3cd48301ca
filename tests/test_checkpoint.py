"""Checkpoints: a restore is bit-exact, on any devices; saves run in the background, one at a time."""

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


def test_save_async_keeps_the_values_of_its_step_under_donation(tmp_path, monkeypatch):
    """40 MB, so that later steps run during the write. The manifest waits for them, however fast the disk is."""
    stepped, manifest = threading.Event(), checkpoint._write_manifest
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda path: stepped.wait(60) and manifest(path))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.device_put({f"w{i}": np.full(1_000_000, i, np.float32) for i in range(10)})
    state = overwrite(overwrite(state))  # the step is compiled, and the state is its output, as in training
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


def test_save_async_waits_for_the_previous_save_and_keeps_the_newest(tmp_path):
    saves = [checkpoint.save_async(tmp_path, step, train_state(step), keep=2) for step in (1, 2, 10)]
    assert saves[0].done() and saves[1].done()
    checkpoint.wait()
    assert saves[2].done() and sorted(path.name for path in tmp_path.iterdir()) == ["10", "2"]
    step, restored = checkpoint.restore(tmp_path, abstract(train_state()), step=2)
    assert step == restored.step == 2
    with pytest.raises(ValueError, match=r"1: no complete checkpoint; .* has steps \[2, 10\]"):
        checkpoint.restore(tmp_path, abstract(train_state()), step=1)
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 11, train_state(1), keep=0)


def test_save_of_an_earlier_step_replaces_it_and_drops_later_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, train_state(step), keep=3)
    checkpoint.save(tmp_path, 2, train_state(5), keep=3)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.restore(tmp_path, abstract(train_state()))[1].step == 5


def test_save_writes_the_manifest_of_every_file_after_syncing_them(tmp_path, monkeypatch):
    synchronised, synchronise = [], checkpoint._synchronise

    def spied(path):
        synchronised.append(path)
        synchronise(path)

    monkeypatch.setattr(checkpoint, "_synchronise", spied)
    checkpoint.save(tmp_path, 1, train_state(1))
    recorded = json.loads((tmp_path / "1" / "manifest.json").read_bytes())
    names = {path.relative_to(tmp_path / "1").as_posix() for path in files_of(tmp_path, 1)}
    assert recorded.keys() == names - {"manifest.json"}
    partial = tmp_path / "1.partial"
    before = synchronised[: synchronised.index(partial / "manifest.json.partial")]
    assert {partial / name for name in recorded} < set(before)
    assert synchronised[-2:] == [partial, tmp_path]


def test_restore_of_parameters_leaves_out_the_optimizer(tmp_path):
    state = train_state(3)
    checkpoint.save(tmp_path, 3, state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    step, params = checkpoint.restore(tmp_path, shapes, key="params")
    assert step == 3
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    assert bits(params) == bits(state.params)


def test_restore_names_a_leaf_unlike_the_expected_one(tmp_path):
    state = train_state(1)
    checkpoint.save(tmp_path, 1, state)
    like = abstract(state)
    head, emb, blocks = like.params["head"], like.params["emb"], like.params["blocks"]
    wide = {"kernel": jax.ShapeDtypeStruct((8, 17), jnp.float32)}
    for params, message in (
        ({"head": wide}, r"kernel is bfloat16\[8, 16\] in the checkpoint, expected float32\[8, 17\]"),
        ({"head": head, "bias": wide}, r"params\.bias\.kernel is absent in the checkpoint, expected float32\[8, 17\]"),
        ({}, r"params\.head\.kernel is .* expected no such leaf"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            checkpoint.restore(tmp_path, like.replace(params={"emb": emb, "blocks": blocks} | params))
        one_line(error)


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


def test_checkpoint_hides_orbax_logs_below_warnings_and_no_others():
    (kept,) = [f for f in logging.getLogger("absl").filters if f.__module__ == checkpoint.__name__]
    record = lambda path, level, exc=None: logging.LogRecord("absl", level, path, 1, "", (), exc)
    assert kept(record("/a/orbax/b.py", logging.WARNING)) and kept(record("/a/b.py", logging.INFO))
    assert not kept(record("/a/orbax/b.py", logging.INFO))
    assert not kept(record("/a/orbax/b.py", logging.ERROR, (ValueError, ValueError(), None)))
