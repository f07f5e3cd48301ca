"""Loading from a training workdir, and onto several devices."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from weights import assert_same_params, assert_same_tensors, official, one_line, tiny, write_workdir

import rwkv_jax
from rwkv_jax import interop
from rwkv_jax.interop import pth


def mesh(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def split(x, axis, devices):
    spec = [None] * x.ndim
    spec[axis] = "data" if x.shape[axis] % devices == 0 else None
    return NamedSharding(mesh(devices), PartitionSpec(*spec))


# ---- shardings


def test_load_takes_one_sharding_or_a_tree_of_them(tmp_path):
    pth.write(tmp_path / "model.pth", official())
    replicated, parted = (NamedSharding(mesh(1), PartitionSpec(*axes)) for axes in ((), ("data",)))
    _, params = rwkv_jax.load(tmp_path / "model.pth", sharding=replicated)
    assert all(x.sharding == replicated for x in jax.tree.leaves(params))
    tree = jax.tree.map(lambda _: replicated, params)
    tree["head"]["kernel"] = parted
    _, params = rwkv_jax.load(tmp_path / "model.pth", sharding=tree)
    assert jax.tree.map(lambda x: x.sharding, params) == tree
    assert_same_tensors(interop.to_official(params), official())
    with one_line("sharding is a dict; expected None, a Sharding, or a tree"):
        rwkv_jax.load(tmp_path / "model.pth", sharding={"emb": replicated})


@pytest.mark.parametrize("source", ["model.pth", "run"])
def test_load_gives_each_of_four_devices_its_part(tmp_path, source):
    model, params = tiny()
    if source == "run":
        write_workdir(tmp_path / source, model, params, 1)
    else:
        rwkv_jax.save(tmp_path / source, model, params)
    for scan in (True, False):
        expected = tiny(scan=scan)[1]
        kernel = lambda p, scan=scan: p["blocks" if scan else "blocks_0"]["ffn"]["key"]["kernel"]
        for axis, devices in ((-1, 4), (0, 2)):
            shardings = jax.tree.map(lambda x, a=axis, n=devices: split(x, a, n), expected)
            _, found = interop.load(tmp_path / source, sharding=shardings, scan=scan)
            assert jax.tree.map(lambda x: x.sharding, found) == shardings
            assert_same_params(found, expected)
            assert kernel(found).addressable_shards[0].data.size == kernel(expected).size // devices


# ---- workdirs


@pytest.mark.parametrize("trained_scan", [True, False])
def test_load_of_a_workdir_gives_its_newest_valid_parameters(tmp_path, trained_scan, capfd):
    model, params = tiny(scan=trained_scan)
    write_workdir(tmp_path, model, params, 1, 2)
    for scan in (True, False):
        loaded, found = rwkv_jax.load(tmp_path, scan=scan)
        assert loaded == model.clone(scan=scan)
        assert_same_params(found, jax.tree.map(lambda x: x * 2, tiny(scan=scan)[1]))
    half, params_half = rwkv_jax.load(tmp_path, dtype="bfloat16")
    assert (half.dtype, params_half["head"]["kernel"].dtype) == ("bfloat16", jnp.bfloat16)
    assert params_half["blocks"]["att"]["time_decay"].dtype == jnp.float32
    assert interop.describe(tmp_path) == model
    (tmp_path / "checkpoints" / "2" / "_METADATA").unlink()
    loaded, found = rwkv_jax.load(tmp_path, scan=trained_scan)
    assert loaded == model
    assert_same_params(found, params)
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", r"config.json: no JSON: Expecting"),
        ("[]", r"config.json: holds a JSON list, expected an object"),
        ('{"vocab_size": 11}', r"config.json: expected \{\"model\".*KeyError\('model'\)"),
        ('{"model": {"vocab_size": 11}}', r"config.json: expected .*KeyError\('name'\)"),
        ('{"model": {"name": "rwkv9"}}', "unknown model name 'rwkv9'"),
        ('{"model": {"name": "rwkv4", "vocab_size": 11, "num_layers": 2, "dim": 8}}', "no valid checkpoint"),
    ],
)
def test_load_names_what_is_wrong_with_a_workdir(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with one_line(message):
        rwkv_jax.load(tmp_path)


def test_load_names_a_workdir_of_another_config(tmp_path):
    write_workdir(tmp_path, *tiny(), 1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["dim"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"params\.\S+ is float32\[.*\] in the checkpoint, expected float32\["):
        rwkv_jax.load(tmp_path)
