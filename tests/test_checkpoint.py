import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import SingleDeviceSharding

from rwkv_jax import checkpoint

ROOT = Path(__file__).parents[1]


@struct.dataclass
class TrainState:
    step: Any
    params: Any
    opt_state: Any
    skipped: Any


def train_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    drawn = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(size=shape), dtype)
    params = {
        "emb": {"embedding": drawn(16, width)},
        "blocks": {"att": {"time_decay": drawn(2, width)}},
        "head": {"kernel": drawn(width, 16, dtype=jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt_state = jax.tree.map(lambda x: drawn(*x.shape).astype(x.dtype), optimizer.init(params))
    return TrainState(jnp.int32(seed), params, opt_state, jnp.int32(0))


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree):
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def files_of(folder, step):
    return sorted(file for file in (folder / str(step)).rglob("*") if file.is_file())


def test_round_trip_is_bit_exact(tmp_path, capfd):
    state = train_state(7)
    checkpoint.save(tmp_path / "checkpoints", 7, state)
    step, restored = checkpoint.restore(tmp_path / "checkpoints", abstract(state))
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
    assert capfd.readouterr() == ("", "")


def test_what_is_saved_is_what_was_there_though_the_next_steps_take_its_buffers(tmp_path, monkeypatch):
    """40 MB, so that the steps run while they are written; and the manifest waits for them, however fast the disk."""
    stepped, manifest = threading.Event(), checkpoint._write_manifest
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda path: stepped.wait(60) and manifest(path))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.full(1_000_000, i, jnp.float32) for i in range(10)}
    state = overwrite(overwrite(state))  # compiled, and an output of a step as in training
    saving = checkpoint.save_async(tmp_path, 1, state)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    assert not saving.done() and checkpoint.steps(tmp_path) == []
    assert float(state["w7"][0]) == 12
    stepped.set()
    saving.result()
    restored = checkpoint.restore(tmp_path, state)[1]
    assert all((np.asarray(restored[f"w{i}"]) == i + 2).all() for i in range(10))


def test_a_save_waits_for_the_one_before(tmp_path):
    saves = [checkpoint.save_async(tmp_path, step, train_state(step), keep=3) for step in (1, 2, 3)]
    assert saves[0].done() and saves[1].done()
    checkpoint.wait()
    assert saves[2].done() and checkpoint.steps(tmp_path) == [1, 2, 3]


def test_the_newest_are_kept_and_a_named_step_is_restored(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, train_state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2"]
    assert checkpoint.steps(tmp_path)[-1] == 10
    step, restored = checkpoint.restore(tmp_path, abstract(train_state()), step=2)
    assert step == restored.step == 2
    with pytest.raises(ValueError, match=r"1: no complete checkpoint; .* has steps \[2, 10\]"):
        checkpoint.restore(tmp_path, abstract(train_state()), step=1)


def test_saving_again_replaces_the_step_and_drops_the_steps_of_an_abandoned_future(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, train_state(step), keep=3)
    checkpoint.save(tmp_path, 2, train_state(5), keep=3)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.restore(tmp_path, abstract(train_state()))[1].step == 5


def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoint.steps(tmp_path / "absent") == []
    with pytest.raises(ValueError, match="no valid checkpoint") as error:
        checkpoint.restore(tmp_path / "absent", train_state())
    one_line(error)


def test_a_checkpoint_without_manifest_does_not_exist(tmp_path):
    checkpoint.save(tmp_path, 1, train_state(1))
    checkpoint.save(tmp_path, 2, train_state(2))
    (tmp_path / "2" / "manifest.json").unlink()
    assert checkpoint.steps(tmp_path)[-1] == 1
    assert checkpoint.restore(tmp_path, abstract(train_state()))[0] == 1
    checkpoint.save(tmp_path, 2, train_state(3))
    assert checkpoint.restore(tmp_path, abstract(train_state()))[1].step == 3


def test_leftovers_of_a_killed_save_are_cleared_and_nothing_else(tmp_path):
    for name in ("5.partial", "7.partial.orbax-checkpoint-tmp-1", "4.partial.removed", "9"):
        (tmp_path / name / "d").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, 6, train_state(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "9", "notes.txt"]
    assert checkpoint.steps(tmp_path) == [6]


def test_every_flipped_byte_is_noticed(tmp_path):
    checkpoint.save(tmp_path, 1, train_state(1))
    rng = np.random.default_rng(0)
    files = files_of(tmp_path, 1)
    assert len(files) > 5
    for file in files + [files[i] for i in rng.integers(len(files), size=60)]:
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
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b" ", 1))
    with pytest.raises(ValueError, match=r"damaged checkpoint: manifest.json"):
        checkpoint.verify(tmp_path, 1)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, capfd, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, train_state(step))
    file = max(files_of(tmp_path, 2), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + (b"" if damage == "truncate" else bytes([whole[-1] ^ 1])))
    step, restored = checkpoint.restore(tmp_path, abstract(train_state()))
    assert step == restored.step == 1
    report = capfd.readouterr().err
    assert report.count("\n") == 1
    assert f"{tmp_path / '2'}: damaged checkpoint: file {file.relative_to(tmp_path / '2')}" in report
    with pytest.raises(ValueError, match="damaged checkpoint"):
        checkpoint.restore(tmp_path, abstract(train_state()), step=2)


def test_all_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, train_state(step))
        (tmp_path / str(step) / "_METADATA").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"no valid checkpoint \(complete ones: \[1, 2\]\)"):
        checkpoint.restore(tmp_path, abstract(train_state()))


def test_a_part_is_restored_without_the_optimizer(tmp_path):
    state = train_state(3)
    checkpoint.save(tmp_path, 3, state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    step, params = checkpoint.restore(tmp_path, shapes, key="params")
    assert step == 3
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    assert bits(params) == bits(state.params)
    with pytest.raises(ValueError, match=r"parameters\.\S+ is absent in the checkpoint"):
        checkpoint.restore(tmp_path, shapes, key="parameters")


def test_a_leaf_unlike_the_expected_one_is_named(tmp_path):
    state = train_state(1)
    checkpoint.save(tmp_path, 1, state)
    wider = abstract(train_state(1, width=9))
    with pytest.raises(ValueError, match=r"is \w+\[2, 8\] in the checkpoint, expected \w+\[2, 9\]") as error:
        checkpoint.restore(tmp_path, wider)
    one_line(error)
    wide = {"kernel": state.params["head"]["kernel"].astype(jnp.float32)}
    message = r"params\.head\.kernel is bfloat16\[8, 16\] in the checkpoint, expected float32\[8, 16\]"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, abstract(state.replace(params=state.params | {"head": wide})))
    more = state.replace(params=state.params | {"bias": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"params\.bias is absent in the checkpoint, expected float32\[3\]"):
        checkpoint.restore(tmp_path, abstract(more))
    fewer = state.replace(params={"emb": state.params["emb"], "blocks": state.params["blocks"]})
    with pytest.raises(ValueError, match=r"params\.head\.kernel is .* expected no such leaf"):
        checkpoint.restore(tmp_path, abstract(fewer))


def test_orbax_stays_quiet_while_others_keep_their_logs(tmp_path, capfd):
    program = f"""
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from rwkv_jax import checkpoint
logging.getLogger("absl").info("mine")
import numpy as np
checkpoint.save({str(tmp_path)!r}, 1, {{"a": np.zeros(3)}})
checkpoint.restore({str(tmp_path)!r}, {{"a": np.zeros(3)}})
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    logged = [line for line in run.stderr.splitlines() if "absl" in line]
    assert logged == ["INFO:absl:mine"]


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rwkv_jax import checkpoint

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec(None, "data"))
like = {"w": jax.ShapeDtypeStruct((6, 8), np.float32, sharding=split)}
step, tree = checkpoint.restore(sys.argv[1], like)
assert step == 1 and tree["w"].sharding == split
assert {shard.data.shape for shard in tree["w"].addressable_shards} == {(6, 2)}
assert np.array_equal(tree["w"], np.arange(48, dtype=np.float32).reshape(6, 8))
checkpoint.save(sys.argv[1], 2, {"w": tree["w"] + 1})
"""


def test_one_device_to_four_and_back(tmp_path):
    tree = {"w": jnp.arange(48.0).reshape(6, 8)}
    checkpoint.save(tmp_path, 1, tree)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", SHARDED, tmp_path], cwd=ROOT, env=env, check=True)
    step, restored = checkpoint.restore(tmp_path, abstract(tree))
    assert step == 2
    assert bits(restored) == bits({"w": tree["w"] + 1})


SAVING = """
import sys
import numpy as np
from rwkv_jax import checkpoint

for step in range(1, 1000):
    print(step, flush=True)
    checkpoint.save(sys.argv[1], step, {"w": np.full(2_000_000, step, np.float32), "step": np.int32(step)})
"""


def killed_while_saving(folder, step, seconds):
    """Kill a process `seconds` after it began to save `step`."""
    process = subprocess.Popen([sys.executable, "-c", SAVING, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == step:
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def assert_whole(folder, capfd):
    like = {"w": np.zeros(2_000_000, np.float32), "step": np.int32(0)}
    step, tree = checkpoint.restore(folder, like)
    assert tree["step"] == step
    assert (tree["w"] == step).all()
    assert capfd.readouterr().err == ""
    checkpoint.save(folder, step + 1, tree)
    assert sorted(int(path.name) for path in folder.iterdir()) == [step, step + 1]
    return step


def test_killed_in_the_middle_of_a_save_the_one_before_is_used(tmp_path, capfd):
    killed_while_saving(tmp_path, 3, 0.01)
    assert assert_whole(tmp_path, capfd) >= 2


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path, capfd):
    within = 0
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        killed_while_saving(folder, 3, attempt * 0.01)
        within += any(".partial" in path.name for path in folder.iterdir())
        assert assert_whole(folder, capfd) >= 2
    assert within > 0, "no kill fell into a save"


def test_the_manifest_is_written_last(tmp_path):
    checkpoint.save(tmp_path, 1, train_state(1))
    manifest = tmp_path / "1" / "manifest.json"
    recorded = json.loads(manifest.read_bytes())
    others = [file for file in files_of(tmp_path, 1) if file != manifest]
    assert sorted(recorded) == sorted(str(file.relative_to(tmp_path / "1")) for file in others)
    assert manifest.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in others)


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 1, train_state(1), keep=0)
