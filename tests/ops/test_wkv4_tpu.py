"""The TPU kernels compiled for TPUs that are not attached; test_wkv4.py judges what they compute, interpreted."""

import os

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rwkv_jax import models
from rwkv_jax.ops import WKV4State, wkv4
from rwkv_jax.train import rehearse

# A library of 480 MB for the whole machine, outside the environment: in it, jax would look for a TPU at every start.
needs_libtpu = pytest.mark.skipif(
    "TPU_LIBRARY_PATH" not in os.environ, reason="libtpu (Linux on x86-64 only) is installed by `make test-all`"
)
TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.fixture(autouse=True)
def uncached(monkeypatch):
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    with rehearse.uncached():
        yield


def mesh_of(target):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(params=TARGETS)
def device(request):
    return mesh_of(request.param).devices[0]


def operands(device, B, T, D, dtype, masks):
    on = jax.sharding.SingleDeviceSharding(device)
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=on)
    tokens, state = array(B, T, D, dtype=dtype), WKV4State(*[array(B, D)] * 3)
    masks = {"reset_BT": array(B, T, dtype=bool), "valid_BT": array(B, T, dtype=bool)} if masks else {}
    return array(D), array(D), tokens, tokens, state, masks


def forward(w_D, u_D, k_BTD, v_BTD, state, masks):
    return wkv4(w_D, u_D, k_BTD, v_BTD, state, impl="pallas", **masks)


def loss(*args):
    y_BTD, state = forward(*args)
    return (y_BTD.astype(jnp.float32) ** 2).sum() + state.num.sum() + state.den.sum()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "masks"),
    [
        ((8, 4096, 1024), "bfloat16", False),
        ((2, 300, 768), "float32", False),
        ((1, 17, 200), "bfloat16", True),
    ],
    ids=str,
)
def test_wkv4_tpu_compiles_to_one_kernel_a_pass(device, shape, dtype, masks):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    text = gradient.lower(*operands(device, *shape, dtype, masks)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward, and no loop around them
    assert " while(" not in text


@needs_libtpu
@pytest.mark.slow
def test_wkv4_tpu_kernel_compiles_in_a_model_split_over_rows():
    """XLA refuses to split a kernel itself; `layers.on_own_rows` gives each device its own rows."""
    mesh = mesh_of("v5e")
    model = models.build("rwkv4", vocab_size=256, num_layers=2, dim=128, wkv_impl="pallas")
    on = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    tokens_BT = on(jax.ShapeDtypeStruct((8, 256), jnp.int32), P("data"))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: on(x, P()), params)
    mean = lambda params, tokens_BT: model.apply({"params": params}, tokens_BT)[0].mean()
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"),)):
        text = jax.jit(jax.grad(mean)).lower(params, tokens_BT).compile().as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
