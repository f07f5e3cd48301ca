import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
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
        ("{", r"config.json: no JSON: Expecting"),
        ("[]", r"config.json: holds a JSON list, expected an object"),
        ('{"vocab_size": 11}', r"config.json: expected \{\"model\".*KeyError\('model'\)"),
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
    with pytest.raises(ValueError, match=r"model.gguf: cannot write format 'gguf'; expected .pth, .saf"):
        rwkv_jax.save(tmp_path / "model.gguf", model, params)
    hybrid = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=2, dim=D, layers=("rwkv4", "attention"))
    for format in ("pth", "huggingface", "rwkv.cpp"):
        with pytest.raises(
            ValueError, match=f"{format} .* this model has 'attention' layers; save it as .safetensors"
        ):
            rwkv_jax.save(tmp_path / "model", hybrid, params, format=format)
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


def test_a_folder_gets_the_tokenizer_of_the_source(tmp_path, capsys):
    model = rwkv_jax.build("rwkv4", vocab_size=256, num_layers=1, dim=D)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    assert command_line.main([str(tmp_path / "model.pth"), str(tmp_path / "folder")]) == 0
    assert "bytes, guessed" in capsys.readouterr().err
    lm = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "folder")
    assert lm.tokenizer.encode("é") == [195, 169] and capsys.readouterr().err == ""


# ---- live judges


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
