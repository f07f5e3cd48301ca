import base64
import io
import json
import math
import os
import pickle
import resource
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rwkv_jax
from rwkv_jax import checkpoint, interop
from rwkv_jax.interop import __main__ as command_line
from rwkv_jax.interop import pth

ROOT = Path(__file__).parents[1]
V, L, D, F = 11, 3, 8, 24

MATRICES = {
    "att.key": (D, D),
    "att.value": (D, D),
    "att.receptance": (D, D),
    "att.output": (D, D),
    "ffn.key": (F, D),
    "ffn.receptance": (D, D),
    "ffn.value": (D, F),
}
LAYER_SHAPES = {
    **{f"{name}.weight": shape for name, shape in MATRICES.items()},
    **{f"{norm}.{leaf}": (D,) for norm in ("ln1", "ln2") for leaf in ("weight", "bias")},
    **{f"att.{name}": (D,) for name in ("time_decay", "time_first")},
    **{f"att.time_mix_{x}": (1, 1, D) for x in "kvr"},
    **{f"ffn.time_mix_{x}": (1, 1, D) for x in "kr"},
}
OFFICIAL_SHAPES = {
    "emb.weight": (V, D),
    "head.weight": (V, D),
    **{f"{norm}.{leaf}": (D,) for norm in ("blocks.0.ln0", "ln_out") for leaf in ("weight", "bias")},
    **{f"blocks.{i}.{name}": shape for i in range(L) for name, shape in LAYER_SHAPES.items()},
}


def official(dtype=np.float32, shapes=OFFICIAL_SHAPES):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- names and layouts


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_official_to_ours_and_back_is_bit_exact(scan, dtype):
    tensors = official(jnp.dtype(dtype))
    model, params = interop.from_official(tensors, scan=scan)
    assert (model.vocab_size, model.num_layers, model.dim, model.hidden_dim) == (V, L, D, F)
    assert (model.scan, model.param_dtype) == (scan, dtype)
    assert model.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    expected = {
        name: x.astype(np.float32) if name.endswith(("time_decay", "time_first")) else x for name, x in tensors.items()
    }
    assert_same(interop.to_official(params), expected)


def test_ours_is_what_the_model_initialises():
    for scan in (True, False):
        model, params = interop.from_official(official(), scan=scan)
        init = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init)


def test_kernels_are_transposed_and_layers_stay_in_order():
    tensors = official()
    _, params = interop.from_official(tensors)
    for i in range(L):
        kernel = params["blocks"]["ffn"]["key"]["kernel"][i]
        np.testing.assert_array_equal(kernel, tensors[f"blocks.{i}.ffn.key.weight"].T)
        mix = params["blocks"]["att"]["time_mix_k"][i]
        np.testing.assert_array_equal(mix, tensors[f"blocks.{i}.att.time_mix_k"][0, 0])
    np.testing.assert_array_equal(params["ln0"]["scale"], tensors["blocks.0.ln0.weight"])
    np.testing.assert_array_equal(params["emb"]["embedding"], tensors["emb.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["head.weight"].T)


def test_more_than_ten_layers_keep_their_numbers():
    shapes = {name: shape for name, shape in OFFICIAL_SHAPES.items() if not name.startswith("blocks.")}
    shapes |= {f"blocks.0.ln0.{leaf}": (D,) for leaf in ("weight", "bias")}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in LAYER_SHAPES.items()}
    tensors = official(shapes=shapes)
    for scan in (True, False):
        _, params = interop.from_official(tensors, scan=scan)
        assert_same(interop.to_official(params), tensors)


def test_dtype_casts_everything_but_the_decays():
    model, params = interop.from_official(official(), dtype="bfloat16")
    assert (model.dtype, model.param_dtype) == ("bfloat16", "bfloat16")
    for path, x in flatten_dict(params).items():
        assert x.dtype == ("float32" if path[-1] in ("time_decay", "time_first") else "bfloat16"), path
    with pytest.raises(ValueError, match="dtype is 'int8', expected 'float32'"):
        interop.from_official(official(), dtype="int8")


def test_deepspeed_prefix_is_dropped():
    tensors = {f"_forward_module.{name}": x for name, x in official().items()}
    assert_same(interop.to_official(interop.from_official(tensors)[1]), official())


def without(name):
    return {key: x for key, x in official().items() if key != name}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (without("blocks.1.att.key.weight"), r"key 'blocks.1.att.key.weight' is missing"),
        (without("blocks.0.ln0.bias"), r"key 'blocks.0.ln0.bias' is missing"),
        (without("head.weight"), r"key 'head.weight' is missing"),
        (without("emb.weight"), r"no RWKV-4 weights: 'emb.weight' is not among the \d+ keys \['head.weight'"),
        ({}, r"no RWKV-4 weights: 'emb.weight' is not among the 0 keys"),
        (official() | {"head_q.weight": np.zeros((D, D))}, r"unknown key 'head_q.weight'"),
        (official() | {"blocks.7.ln1.bias": np.zeros(D)}, r"key 'blocks.3.att.key.weight' is missing"),
        (
            official() | {"blocks.2.ffn.value.weight": np.zeros((F, D))},
            r"'blocks.2.ffn.value.weight' has shape \(24, 8\), expected \(8, 24\)",
        ),
        (
            official() | {"blocks.0.att.time_mix_v": np.zeros(D)},
            r"'blocks.0.att.time_mix_v' has shape \(8,\), expected \(1, 1, 8\)",
        ),
        (official() | {"emb.weight": np.zeros(D)}, r"'emb.weight' has shape \(8,\), expected a matrix"),
        (
            official() | {"ln_out.bias": np.zeros(D, np.int64)},
            r"'ln_out.bias' has dtype int64, expected floating point",
        ),
        (official() | {"blocks.0.att.ln_x.weight": np.zeros(D)}, r"RWKV-5 weights .*only RWKV-4 is supported"),
        (
            official() | {"blocks.0.att.time_maa_x": np.zeros(D), "blocks.0.att.ln_x.bias": np.zeros(D)},
            r"RWKV-6 weights \(they have 'blocks.0.att.time_maa_x'\)",
        ),
        (
            official() | {"blocks.0.att.ln_x.bias": np.zeros(D), "blocks.0.att.r_k": np.zeros((1, D))},
            r"RWKV-7 weights \(they have 'blocks.0.att.r_k'\)",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named(tensors, message):
    with pytest.raises(ValueError, match=message) as error:
        interop.from_official(tensors)
    one_line(error)


# ---- load and save


@pytest.fixture(scope="module")
def small():
    model = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=L, dim=D, hidden_dim=F)
    tokens_BT = jnp.arange(10).reshape(2, 5) % V
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)["params"]
    noise = lambda x: x + np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype) / 4
    return model, jax.tree.map(noise, params), tokens_BT


def logits(model, params, tokens_BT):
    return jax.jit(model.apply)({"params": params}, tokens_BT)[0]


def test_saved_and_loaded_it_is_the_same_model(tmp_path, small):
    model, params, tokens_BT = small
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    (tmp_path / "model.pth").rename(tmp_path / "weights.bin")  # content tells the format, not the suffix
    loaded, again = rwkv_jax.load(tmp_path / "weights.bin")
    assert jax.tree.map(np.array_equal, params, again) == jax.tree.map(lambda _: True, params)
    np.testing.assert_array_equal(logits(loaded, again, tokens_BT), logits(model, params, tokens_BT))
    by_layer, per_layer = rwkv_jax.load(tmp_path / "weights.bin", scan=False)
    np.testing.assert_allclose(
        logits(by_layer, per_layer, tokens_BT), logits(model, params, tokens_BT), rtol=1e-5, atol=1e-5
    )
    rwkv_jax.save(tmp_path / "again.pth", by_layer, per_layer)
    assert_same(pth.read(tmp_path / "again.pth"), interop.to_official(params))


def test_loaded_parameters_do_not_depend_on_the_file(tmp_path):
    pth.write(tmp_path / "model.pth", official())
    _, params = rwkv_jax.load(tmp_path / "model.pth", scan=False)
    content = bytearray((tmp_path / "model.pth").read_bytes())
    content[200:] = bytes(len(content) - 200)
    (tmp_path / "model.pth").write_bytes(content)
    assert_same(interop.to_official(params), official())


def test_sharding_is_one_or_a_tree(tmp_path):
    pth.write(tmp_path / "model.pth", official())
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    _, params = rwkv_jax.load(tmp_path / "model.pth", sharding=replicated)
    assert all(x.sharding == replicated for x in jax.tree.leaves(params))
    tree = jax.tree.map(lambda _: replicated, params)
    tree["head"]["kernel"] = split
    _, params = rwkv_jax.load(tmp_path / "model.pth", sharding=tree)
    assert jax.tree.map(lambda x: x.sharding, params) == tree
    assert_same(interop.to_official(params), official())
    with pytest.raises(ValueError, match="sharding is a dict; expected None, a Sharding, or a tree"):
        rwkv_jax.load(tmp_path / "model.pth", sharding={"emb": replicated})


SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rwkv_jax import interop

def split(x, axis, parts):
    mesh = jax.make_mesh((parts,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts])
    spec = [None] * x.ndim
    spec[axis] = "data" if x.shape[axis] % parts == 0 else None
    return NamedSharding(mesh, PartitionSpec(*spec))

for path in sys.argv[1:]:
    for scan in (True, False):
        model, params = interop.load(path, scan=scan)
        kernel = lambda p: p["blocks" if scan else "blocks_0"]["ffn"]["key"]["kernel"]
        for axis, parts in ((-1, 4), (0, 3)):
            shardings = jax.tree.map(lambda x: split(x, axis, parts), params)
            _, sharded = interop.load(path, sharding=shardings, scan=scan)
            assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
            assert jax.tree.all(jax.tree.map(np.array_equal, params, sharded))
            if scan or axis == -1:
                assert kernel(sharded).addressable_shards[0].data.size == kernel(params).size // parts
"""


def test_four_devices_each_get_their_part(tmp_path, small):
    model, params, _ = small
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    write_workdir(tmp_path / "run", model, params, 1)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    sources = [tmp_path / "model.pth", tmp_path / "run"]
    subprocess.run([sys.executable, "-W", "error", "-c", SHARDED, *sources], cwd=ROOT, env=env, check=True)


def write_workdir(path, model, params, *steps):
    path.mkdir(exist_ok=True)
    sizes = {"vocab_size": V, "num_layers": L, "dim": D, "hidden_dim": F, "layers": list(model.layers)}
    config = {"model": {"name": "rwkv4", "scan": model.scan, **sizes}, "corpus": "none"}
    (path / "config.json").write_text(json.dumps(config))
    for step in steps:
        state = {"step": np.int32(step), "params": jax.tree.map(lambda x, s=step: x * s, params)}
        checkpoint.save(path / "checkpoints", step, state | {"opt_state": (np.zeros(3),)})


@pytest.mark.parametrize("trained_scan", [True, False])
def test_a_workdir_gives_its_newest_valid_parameters(tmp_path, small, trained_scan, capfd):
    model, params, tokens_BT = small
    trained = params if trained_scan else rwkv_jax.unstack(params)
    write_workdir(tmp_path, model.clone(scan=trained_scan), trained, 1, 2)
    for scan in (True, False):
        loaded, again = rwkv_jax.load(tmp_path, scan=scan)
        assert loaded.scan == scan
        assert_same(interop.to_official(again), interop.to_official(jax.tree.map(lambda x: x * 2, params)))
    half, params_half = rwkv_jax.load(tmp_path, dtype="bfloat16")
    assert (half.dtype, params_half["head"]["kernel"].dtype) == ("bfloat16", jnp.bfloat16)
    assert params_half["blocks"]["att"]["time_decay"].dtype == jnp.float32
    (tmp_path / "checkpoints" / "2" / "_METADATA").unlink()
    loaded, again = rwkv_jax.load(tmp_path)
    np.testing.assert_array_equal(logits(loaded, again, tokens_BT), logits(model, params, tokens_BT))
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", r"config.json: expected \{\"model\""),
        ("[]", r"config.json: expected \{\"model\""),
        ('{"model": {"vocab_size": 11}}', r"config.json: expected .*KeyError\('name'\)"),
        ('{"model": {"name": "rwkv9"}}', "unknown model name 'rwkv9'"),
        ('{"model": {"name": "rwkv4", "vocab_size": 11, "num_layers": 3, "dim": 8}}', "no valid checkpoint"),
    ],
)
def test_a_workdir_that_does_not_fit_is_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as error:
        rwkv_jax.load(tmp_path)
    one_line(error)


def test_a_workdir_of_another_config_is_named(tmp_path, small):
    model, params, _ = small
    write_workdir(tmp_path, model, params, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["dim"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"params\.\S+ is float32\[.*\] in the checkpoint, expected float32\["):
        rwkv_jax.load(tmp_path)


def test_nothing_there_and_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.pth: no such file or folder"):
        rwkv_jax.load(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"a folder without config.json"):
        rwkv_jax.load(tmp_path)


def test_what_cannot_be_saved_says_why(tmp_path, small):
    model, params, _ = small
    with pytest.raises(ValueError, match=r"model.gguf: cannot write format '.gguf'; expected .pth"):
        rwkv_jax.save(tmp_path / "model.gguf", model, params)
    with pytest.raises(ValueError, match=r"cannot write format 'rwkv.cpp'; expected .pth"):
        rwkv_jax.save(tmp_path / "model.pth", model, params, format="rwkv.cpp")
    hybrid = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=2, dim=D, layers=("rwkv4", "attention"))
    with pytest.raises(ValueError, match=r"a .pth holds RWKV-4 layers only, and this model has 'attention' layers"):
        rwkv_jax.save(tmp_path / "model.pth", hybrid, params)
    with pytest.raises(ValueError, match=r"params are not those of this model: unknown key 'blocks.2"):
        rwkv_jax.save(tmp_path / "model.pth", model.clone(num_layers=2), params)
    with pytest.raises(FileNotFoundError, match=r"no such folder; cannot write model.pth there"):
        rwkv_jax.save(tmp_path / "absent" / "model.pth", model, params)
    assert not any(tmp_path.iterdir())


def test_the_command_line_converts(tmp_path, small, capsys):
    model, params, _ = small
    write_workdir(tmp_path / "run", model, params, 1)
    target = tmp_path / "model.pth"
    assert command_line.main([str(tmp_path / "run"), str(target), "--dtype", "bfloat16"]) == 0
    assert pth.read(target)["emb.weight"].dtype == jnp.bfloat16
    target.write_bytes(target.read_bytes()[:-100])
    assert command_line.main([str(target), str(tmp_path / "other.pth")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "other.pth").exists()


# ---- the file format

# Written by torch 2.13:
#     state = torch.nn.Linear(2, 3).state_dict()
#     state["weight"] = torch.tensor([[1.5, -2.0], [0.0, 3.25], [-0.5, 8.0]], dtype=torch.bfloat16)
#     state["bias"] = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float16))
#     base = torch.arange(12.0).reshape(3, 4)
#     state["rows"], state["transposed"], state["scalar"] = base[1:], base.T, torch.tensor(7)
#     buffer = io.BytesIO()
#     torch.save(state, buffer)
#     print(base64.b64encode(zlib.compress(buffer.getvalue(), 9)))
TORCH_FILE = zlib.decompress(
    base64.b64decode(
        """
        eNqlVd1v21QUv/mok3pdP7aybmWU7gNIYUttp42TTaydx6xJnrQuCCnaS+QmbmLhxjn2bQtIlSpVLfCKtJdpQjzyzgMPIFH+BF54
        2sOkPUx74k+Ac+3Ws29pC5mVYzvJ/X2c63OOl4xMlpB8nhw6RskZYnrNjr1uzbZMahZ7nzu6NkweJY6tdLPpOo7VpLbb9cUHXsvy
        rNYndpOKQGZqkCrUBSTbsOx2h0K6SV2kLDbWqO34YsOzltdsp9WgVtd3vca6IkKmUKjnEOHjSrNtQTaEiJruuCaVy5+Gv4swUE/h
        MgmEegavzd4a5AyBQv6hQYyMkd6FQSNtpHZB/LbDjJyiMFSD03XMlizbpg/DR3jpmZ65alHLE2Gkg246Bw7umc5KpD4aqMsw1skZ
        GQpnAtUdOGukdmA8VHyLwrkaTHwTfDn/NVyowWQg77kbPryd4A6Si8gvBuQKvIPkQxSmHhpZzCW7C+/iDaY0HQpconC5BlfqIi6m
        ntn1e65vteBqyNy52NnHv8fMZY3MLrxvpBjNByG+QAHPHwYPyG+ajunBRwlX991uOzJ1LTBVgutImqJQRNKZmZBoloJUA3ltE5T6
        IC5q4P6ZrGagFPw/V2cFBfObUA6e7brl+VguoBop3/eXi0tGLr999u87d9OEsFg6signSDkqyuKK662atLHPpmsKV5v/5ZCZ9s9/
        PdtmybE4WnuSqK+198uzYTp2u7tqdamulfqQf1SeYwYWNuAV5k3SxxoYIwuRgeUvqeWyZtO1m/3oHhyOTaljMQ87H7+4wCpBONbD
        MLmVmAqzkq7deAMDewtkD/UWyW/kNnPxxY2tn4ZQZ+gEF5WkC1nX5vpygUS/kkWmTMZPPekjf+XN8g9ZtxbwtIgfjC2MHzD2MJ5j
        kNs4izGmMaRwjzZXbkls9p3gdDzptKRro4ec5vZXM97eny9dRpQ/lneE3Ix4o9ZT+92CksiU//i+/dnJ9T9FlNcNGKTkW56NHfiV
        yd4+Dbula8X/aUSWVLVSVlSlqlarlfk5uazMy2pVVRSpWpXmy9WKqkilSjAmfpze+L2APgqByxQzG/mMj6/RQ8759yiPjg+giQTy
        cZocNfB4kvgQmUwOjgw5ZnLxPPFBMJbg+S7GEw0gHh7v4OEE/FyWcLODx8Z7MIl9ymPlQ7qxruB0BziswmPjlZ/E7vHYEo+N1+5I
        AnteIHyn8OB4SU0l9zoG/vdiXzIE4dpBa2SuR0iRu26nw2sld9DqQnD3y2D4PXzrDQghRgzWh2v/AYIkPWM=
        """
    )
)


def test_a_file_of_torch_is_read(tmp_path):
    path = tmp_path / "torch.pth"
    path.write_bytes(TORCH_FILE)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "weight": np.array([[1.5, -2.0], [0.0, 3.25], [-0.5, 8.0]], ml_dtypes.bfloat16),
        "bias": np.array([0.5, -1.0, 2.0], np.float16),
        "rows": rows[1:],
        "transposed": rows.T,
        "scalar": np.array(7),
    }
    tensors = pth.read(path)
    assert_same(tensors, expected)
    assert tensors["transposed"].strides == (4, 16)


ALL_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def all_kinds():
    rng = np.random.default_rng(1)
    tensors = {name: (rng.normal(size=(3, 5)) * 9).astype(jnp.dtype(name)) for name in ALL_DTYPES}
    tensors["transposed"] = tensors["float32"].T
    tensors["every other"] = tensors["bfloat16"][:, ::2]
    tensors["skálár"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    return tensors


def test_written_and_read_it_is_bit_exact(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, all_kinds())
    assert_same(pth.read(path), all_kinds())
    assert list(pth.read(path)) == list(all_kinds())
    assert os.listdir(tmp_path) == ["model.pth"]
    pth.write(path, {})
    assert pth.read(path) == {}


def test_arrays_are_views_of_the_file_and_start_aligned(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {"x" * n: np.arange(1.0 + n) for n in range(1, 70)})
    starts = [x.ctypes.data % 64 for x in pth.read(path).values()]
    assert starts == [0] * len(starts)
    x = pth.read(path)["x"]
    assert not x.flags.owndata
    assert not x.flags.writeable


def test_reading_needs_no_memory_of_its_own(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {f"w{i}": np.zeros((4096, 4096), np.float32) for i in range(2)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = pth.read(path)
    assert math.prod(tensors["w1"].shape) == 4096**2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB, of 128 MiB


class Unreadable:
    dtype, shape, size, ndim = np.dtype("float32"), (2,), 2, 1

    def __array__(self, *args, **kwargs):
        raise OSError("the device is gone")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {"a": np.ones(3)})
    with pytest.raises(OSError, match="the device is gone"):
        pth.write(path, {"a": np.zeros(3), "b": Unreadable()})
    with pytest.raises(ValueError, match=r"'b' has dtype complex64; a .pth holds float64, float32"):
        pth.write(path, {"a": np.zeros(3), "b": np.zeros(3, np.complex64)})
    assert_same(pth.read(path), {"a": np.ones(3)})
    assert os.listdir(tmp_path) == ["model.pth"]


def rewritten(tmp_path, records=(), compression=zipfile.ZIP_STORED):
    """A valid file with some records replaced (bytes) or left out (None)."""
    pth.write(tmp_path / "valid.pth", {"a": np.arange(6, dtype=np.float32)})
    records = dict(records)
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(tmp_path / "valid.pth") as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = records.get(name.removeprefix("archive/"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tensor_pickle(*, key=b"0", size=6, offset=0, shape=6, stride=1, name=b"X\x01\x00\x00\x00a"):
    number = lambda n: b"J" + n.to_bytes(4, "little", signed=True)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu"
    view = number(offset) + b"(" + number(shape) + b"t(" + number(stride) + b"t\x89}"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(size) + b"tQ" + view + b"tR"
    return b"\x80\x02}" + name + rebuilt + b"s."


def test_the_hand_made_pickle_is_valid(tmp_path):
    path = rewritten(tmp_path, {"data.pkl": tensor_pickle(offset=1, shape=3, stride=2)})
    assert_same(pth.read(path), {"a": np.array([1, 3, 5], np.float32)})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty file"),
        (b"\n\n<!DOCTYPE html><html>not found</html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch's old format, not a zip"),
        (b"GGUF\x03\x00\x00\x00", "not a zip file"),
    ],
)
def test_what_is_no_zip_says_what_it_is(tmp_path, content, message):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.pth: {message}") as error:
        pth.read(tmp_path / "model.pth")
    one_line(error)


@pytest.mark.parametrize(
    "records, message",
    [
        ({"data.pkl": None}, "a zip file without data.pkl"),
        ({"byteorder": b"big"}, "its byteorder is b'big'; expected b'little'"),
        ({"data/0": None}, "'a' needs record 'data/0', which the file lacks"),
        ({"data/0": bytes(20)}, "'a' needs 6 elements of storage '0'; it has 5"),
        ({"data.pkl": tensor_pickle(shape=7)}, "'a' needs 7 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(offset=1)}, "'a' needs 7 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(stride=2)}, "'a' needs 11 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(size=5)}, "'a' needs 6 elements of storage '0'; it has 5"),
        ({"data.pkl": tensor_pickle(shape=9, size=9)}, "'a' needs 9 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(offset=-1)}, "'a' is no strided view of a storage"),
        ({"data.pkl": tensor_pickle(stride=-1, offset=5)}, "'a' is no strided view of a storage"),
        ({"data.pkl": tensor_pickle(key=b"1")}, "'a' needs record 'data/1', which the file lacks"),
        ({"data.pkl": tensor_pickle(name=b"K\x07")}, "key 7 is no string"),
        ({"data.pkl": pickle.dumps({"model": {"a": 1}})}, "'model' holds a dict; expected a flat dict of tensors"),
        ({"data.pkl": pickle.dumps({"step": 7})}, "'step' holds a int; expected a flat dict of tensors"),
        ({"data.pkl": pickle.dumps([1])}, "holds a list; expected a dict of tensors"),
        ({"data.pkl": b""}, "data.pkl is not the pickle of a state dict"),
        ({"data.pkl": b"\x80\x02}q"}, "data.pkl is not the pickle of a state dict"),
    ],
)
def test_what_holds_no_state_dict_says_why(tmp_path, records, message):
    with pytest.raises(ValueError, match=message) as error:
        pth.read(rewritten(tmp_path, records))
    one_line(error)


@pytest.mark.parametrize(
    "value, name",
    [
        (Call(os.mkdir, "canary"), "posix.mkdir"),
        (np.zeros(3), r"numpy._core\S+"),
        (Call(eval, "open('canary', 'w')"), "builtins.eval"),
        (io.BytesIO(b""), "_io.BytesIO"),
    ],
)
def test_any_other_global_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    for protocol in (3, 4, 5):  # protocol 2 would write Python 2's names
        path = rewritten(tmp_path, {"data.pkl": pickle.dumps({"a": value}, protocol)})
        with pytest.raises(ValueError, match=f"asks for '{name}', which no state dict needs; refused") as error:
            pth.read(path)
        one_line(error)
    assert not (tmp_path / "canary").exists()


def test_attributes_in_the_pickle_change_nothing(tmp_path):
    content = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x07sb."
    assert pth.read(rewritten(tmp_path, {"data.pkl": content})) == {}


def test_compressed_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"record 'archive/data.pkl' is compressed") as error:
        pth.read(rewritten(tmp_path, compression=zipfile.ZIP_DEFLATED))
    one_line(error)


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
    path = tmp_path / "model.pth"
    for end in range(4, len(TORCH_FILE), 13):
        path.write_bytes(TORCH_FILE[:end])
        with pytest.raises(ValueError, match="truncated or damaged zip file") as error:
            pth.read(path)
        one_line(error)


def test_damage_is_an_error_or_harmless(tmp_path):
    path = tmp_path / "model.pth"
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(500):
        damaged = bytearray(TORCH_FILE)
        for position in rng.integers(len(damaged), size=rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            for x in pth.read(path).values():
                x.tobytes()
        except ValueError as error:
            assert str(error).startswith(str(path)), error
            noticed += 1
    assert noticed > 100


# ---- live judges


@pytest.mark.live
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_written(tmp_path, mmap):
    import torch

    path = tmp_path / "model.pth"
    pth.write(path, all_kinds())
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(all_kinds())
    for name, x in all_kinds().items():
        assert str(loaded[name].dtype) == f"torch.{x.dtype}"
        assert tuple(loaded[name].shape) == x.shape
        assert loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == x.tobytes(), name


@pytest.mark.live
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_writes_is_read(tmp_path, protocol):
    import torch

    path = tmp_path / "model.pth"
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    state = torch.nn.LSTM(3, 5, 2).state_dict()
    for name in ALL_DTYPES:
        state[name] = (base * 9).to(getattr(torch, name))
    state |= {"slice": base[2:5, 1:3], "transposed": base.T, "expanded": base[:1].expand(3, 4)}
    state |= {"parameter": torch.nn.Parameter(base.bfloat16()), "scalar": torch.tensor(3.0)}
    torch.save(state, path, pickle_protocol=protocol)
    tensors = pth.read(path)
    assert list(tensors) == list(state)
    for name, x in state.items():
        x = x.detach()
        assert str(x.dtype) == f"torch.{tensors[name].dtype}"
        assert tensors[name].shape == tuple(x.shape)
        plain = x.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert tensors[name].tobytes() == plain.tobytes(), name


@pytest.mark.live
def test_old_and_whole_module_files_of_torch_are_refused(tmp_path):
    import torch

    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch's old format"):
        pth.read(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"'torch.nn.modules.linear.Linear', which no state dict needs; refused"):
        pth.read(path)
    torch.save({"state_dict": {"a": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="'state_dict' holds a dict; expected a flat dict of tensors"):
        pth.read(path)


@pytest.mark.live
def test_the_rwkv_package_computes_the_same_from_a_saved_model(tmp_path, small):
    program = """
import os, sys
os.environ["RWKV_JIT_ON"] = os.environ["RWKV_CUDA_ON"] = "0"
import numpy as np
from rwkv.model import RWKV

model = RWKV(model=sys.argv[1].removesuffix(".pth"), strategy="cpu fp32")
logits, _ = model.forward([int(t) for t in sys.argv[3:]], None, full_output=True)
np.save(sys.argv[2], logits.numpy())
"""
    sizes = {"vocab_size": 32, "num_layers": 2, "dim": 64}
    model = rwkv_jax.build("rwkv4", **sizes)
    tokens_BT = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    params = jax.jit(model.init)(jax.random.key(1), tokens_BT)["params"]
    noise = lambda x: x + np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype) / 8
    params = jax.tree.map(noise, params)
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    arguments = [tmp_path / "model.pth", tmp_path / "logits.npy", *map(str, tokens_BT[0].tolist())]
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected_TV = np.load(tmp_path / "logits.npy")
    actual_TV = logits(model, params, tokens_BT)[0]
    assert np.abs(actual_TV - expected_TV).max() < 1e-5 * np.abs(expected_TV).max()
