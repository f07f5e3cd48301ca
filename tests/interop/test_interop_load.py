"""Loading onto several devices."""

import jax
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


def test_load_takes_one_sharding_or_a_tree_of_shardings(tmp_path):
    pth.write(tmp_path / "model.pth", official())
    replicated = NamedSharding(mesh(1), PartitionSpec())
    _, params = rwkv_jax.load(tmp_path / "model.pth", sharding=replicated)
    assert all(x.sharding == replicated for x in jax.tree.leaves(params))
    assert_same_tensors(interop.to_official(params), official())
    with one_line("sharding is a dict; expected None, a Sharding, or a tree"):
        rwkv_jax.load(tmp_path / "model.pth", sharding={"emb": replicated})


@pytest.mark.parametrize("source", ["model.pth", "run"])
def test_load_gives_each_of_four_devices_its_shard(tmp_path, source):
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
            _, found = rwkv_jax.load(tmp_path / source, sharding=shardings, scan=scan)
            assert jax.tree.map(lambda x: x.sharding, found) == shardings
            assert_same_params(found, expected)
            assert kernel(found).addressable_shards[0].data.size == kernel(expected).size // devices
