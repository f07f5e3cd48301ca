"""Every file format of a model: loading returns what was saved."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import drawn, make
from weights import NAMES, RELEASED, F, assert_same_params, assert_same_tensors, official, one_line, tiny

import rwkv_jax
from rwkv_jax import interop
from rwkv_jax.interop import pth, safetensors_file
from rwkv_jax.models import KINDS

# Epsilons of the heads' norm in the code that a file is for, where it is not the released one. Heads have 4 channels.
EPSILONS = {("rwkv5", "rwkv.cpp"): 1e-5, ("rwkv7", "huggingface"): 4e-5}
HELD = [
    (kind, format, dtype)
    for kind in RELEASED
    for format in NAMES
    for dtype in ("float32", "float16", "bfloat16")
    if format in (*KINDS[kind].formats, "safetensors") and (format, dtype) != ("rwkv.cpp", "bfloat16")
]


@pytest.mark.parametrize(("kind", "format", "dtype"), HELD)
def test_load_inverts_save_bit_exactly_in_every_format_and_layout(tmp_path, kind, format, dtype):
    """Formats are detected from the content: the file is renamed before it is loaded."""
    epsilon = EPSILONS.get((kind, format), 64e-5)
    tree = lambda scan: tiny(dtype, scan, kind, head_norm_epsilon=epsilon)
    for saved in (True, False):
        model, params = tree(saved)
        rwkv_jax.save(tmp_path / NAMES[format], model, params, format=format)
        (tmp_path / NAMES[format]).rename(tmp_path / f"{saved}")
        for scan in (True, False):
            loaded, found = rwkv_jax.load(tmp_path / f"{saved}", scan=scan)
            expected = tree(scan)[1]
            assert loaded == interop.describe(tmp_path / f"{saved}").clone(scan=scan) == model.clone(scan=scan)
            if format == "rwkv.cpp":  # stores vectors as float32
                found = jax.tree.map(lambda x, y: np.asarray(x).astype(y.dtype), found, expected)
                expected = jax.tree.map_with_path(stored_decays, expected) if kind == "rwkv5" else expected
            assert_same_params(found, expected)
    assert sorted(os.listdir(tmp_path)) == ["False", "True"]


def stored_decays(path, x):
    """RWKV-5's `time_decay` after exp(-exp(time_decay)) in float32, which rwkv.cpp's file stores."""
    if path[-1].key != "time_decay":
        return x
    decay = np.exp(-np.exp(np.asarray(x, np.float64))).astype(np.float32)
    return np.log(-np.log(decay.astype(np.float64))).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "lowest", "highest", "error"),
    [
        ("rwkv4", -1, 1, lambda x: 6e-8),
        ("rwkv5", -10, 4.4, lambda x: np.where(x < 1, 8e-8 * np.exp(-x), 0)),
    ],
)
def test_rwkv_cpp_stores_bfloat16_as_float32_and_decays_up_to_rounding(tmp_path, kind, lowest, highest, error):
    model, params = tiny("bfloat16", kind=kind, head_norm_epsilon=EPSILONS.get((kind, "rwkv.cpp"), 64e-5))
    decays = np.linspace(lowest, highest, params["blocks"]["att"]["time_decay"].size, dtype=np.float32)
    params = jax.tree.map_with_path(
        lambda path, x: decays.reshape(x.shape) if path[-1].key == "time_decay" else x, params
    )
    rwkv_jax.save(tmp_path / "m", model, params, format="rwkv.cpp")
    _, found = rwkv_jax.load(tmp_path / "m")
    assert (np.abs(np.ravel(found["blocks"]["att"]["time_decay"]) - decays) <= error(decays)).all()
    found["blocks"]["att"]["time_decay"] = params["blocks"]["att"]["time_decay"]
    assert_same_params(found, jax.tree.map(lambda x: x.astype(np.float32), params))


@pytest.mark.parametrize("kind", ["transformer", "hybrid"])
def test_safetensors_carries_any_model(tmp_path, kind):
    model, params = drawn(make(kind, hidden_dim=F, dropout=0.25, dtype="bfloat16"))
    layouts = {True: params, False: rwkv_jax.unstack(params)}
    for scan, tree in layouts.items():
        rwkv_jax.save(tmp_path / f"{scan}", model.clone(scan=scan), tree, format="safetensors")
    for scan, tree in layouts.items():
        loaded, found = rwkv_jax.load(tmp_path / f"{not scan}", scan=scan)
        assert loaded == model.clone(scan=scan)
        assert_same_params(found, tree)
    assert interop.describe(tmp_path / "True") == model
    half, found = rwkv_jax.load(tmp_path / "True", dtype="float16")
    assert (half.dtype, half.param_dtype, found["head"]["kernel"].dtype) == ("float32", "float16", jnp.float16)


def test_load_copies_the_parameters_out_of_the_file(tmp_path):
    pth.write(tmp_path / "model.pth", official())
    _, params = rwkv_jax.load(tmp_path / "model.pth", scan=False)
    content = bytearray((tmp_path / "model.pth").read_bytes())
    content[200:] = bytes(len(content) - 200)
    (tmp_path / "model.pth").write_bytes(content)
    assert_same_tensors(interop.to_official(params), official())


# ---- mistakes


@pytest.mark.parametrize(
    "fields, message",
    [
        ("[" * 100_000, "its metadata 'rwkv_jax': not JSON: "),
        ({"num_layers": 40}, "num_layers is 40, and there are 2 layers"),
        ({"dim": 10**12}, r"'blocks.0.\S+' has shape|'emb.weight' has shape|fields are not those of a model"),
        ({"layers": ["rwkv4", {}]}, "its fields are not those of a model"),
        ({"__class__": "os.system"}, "its fields are not those of a model: unknown model field"),
    ],
)
def test_load_refuses_a_safetensors_file_with_fields_of_no_model(tmp_path, fields, message):
    model, params = tiny()
    rwkv_jax.save(tmp_path / "m.safetensors", model, params)
    tensors, metadata = safetensors_file.read(tmp_path / "m.safetensors")
    text = fields if isinstance(fields, str) else json.dumps(json.loads(metadata["rwkv_jax"]) | fields)
    safetensors_file.write(tmp_path / "m", tensors, {"rwkv_jax": text})
    for scan in (True, False):
        with one_line(message):
            rwkv_jax.load(tmp_path / "m", scan=scan)


def test_save_refuses_what_a_format_cannot_hold(tmp_path):
    model, params = tiny()
    with one_line(r"model.gguf: cannot write format 'gguf'; expected .pth, .saf"):
        rwkv_jax.save(tmp_path / "model.gguf", model, params)
    for format in ("pth", "huggingface", "rwkv.cpp"):
        with one_line(f"{format} .* this one has 'attention' layers; use .safetensors"):
            rwkv_jax.save(tmp_path / "model", make("hybrid"), params, format=format)
    for kind, format, message in (
        ("rwkv5", "huggingface", "this one has 'rwkv5' layers"),
        ("rwkv5", "rwkv.cpp", "rwkv.cpp computes RWKV-5.2 with head_norm_epsilon=1e-05, and this model has 0.001"),
        ("rwkv6", "rwkv.cpp", "rwkv.cpp computes RWKV-6 with head_norm_epsilon=0.00064, and this model has 0.001"),
        ("rwkv7", "huggingface", "compute this model with head_norm_epsilon=4e-05, and it has 0.001; use .safet"),
        ("rwkv7", "pth", "pth holds released models only, and this one has head_norm_epsilon=0.001; use .safetensors"),
    ):
        with one_line(message):
            rwkv_jax.save(tmp_path / "model", *tiny(kind=kind, head_norm_epsilon=1e-3), format=format)
    for format in ("pth", "rwkv.cpp"):  # otherwise read as RWKV-5.1
        with one_line("model: RWKV-5.1 weights"):
            rwkv_jax.save(tmp_path / "model", *tiny(kind="rwkv5", head_size=1), format=format)
    with one_line(r"params are not those of this model: unknown key 'blocks.1"):
        rwkv_jax.save(tmp_path / "model.pth", model.clone(num_layers=1), params)
    with one_line(r"no such folder; cannot write model.pth there", FileNotFoundError):
        rwkv_jax.save(tmp_path / "absent" / "model.pth", model, params)
    assert not any(tmp_path.iterdir())


def test_load_names_a_missing_file_or_config(tmp_path):
    with one_line(r"absent.pth: no such file or folder", FileNotFoundError):
        rwkv_jax.load(tmp_path / "absent.pth")
    with one_line(r"a folder without config.json"):
        rwkv_jax.load(tmp_path)
