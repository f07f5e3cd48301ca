"""Every format that a model can be saved in and loaded from."""

import json
import os
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from huggingface_hub import constants
from small import made

import rwkv_jax
from rwkv_jax import evaluate, interop, tokenizers
from rwkv_jax.generate.__main__ import main as generate_command
from rwkv_jax.interop import __main__ as command_line
from rwkv_jax.interop import hub, huggingface, pth, rwkv_cpp, safetensors_file

NAMES = {"pth": "m.pth", "safetensors": "m.safetensors", "huggingface": "m", "rwkv.cpp": "m.bin"}


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(actual, expected):
    """Two trees of parameters, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def cast(params, dtype):
    """As `load` keeps it: decays stay float32. Decays that a rwkv.cpp file holds exactly: |time_decay| >= 1."""
    exact = lambda x: jnp.where(jnp.abs(x) < 1, x + jnp.where(x < 0, -1, 1), x)

    def one(path, x):
        name = path[-1].key
        return exact(x) if name == "time_decay" else x if name == "time_first" else x.astype(dtype)

    return jax.tree.map_with_path(one, params)


def rwkv(dtype="float32", scan=True):
    model, params = made("rwkv4")
    params = cast(params, dtype)
    dtypes = {"dtype": "float32" if dtype == "float16" else dtype, "param_dtype": dtype}
    return model.clone(scan=scan, **dtypes), params if scan else rwkv_jax.unstack(params)


HELD = [(format, dtype) for format in NAMES for dtype in ("float32", "float16", "bfloat16")]
HELD.remove(("rwkv.cpp", "bfloat16"))  # see the next test


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("format", "dtype"), HELD)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, format, dtype, scan):
    model, params = rwkv(dtype, scan)
    rwkv_jax.save(tmp_path / NAMES[format], model, params, format=format)
    assert os.listdir(tmp_path) == [NAMES[format]]
    (tmp_path / NAMES[format]).rename(tmp_path / "other.name")  # content tells the format
    for again in (True, False):
        loaded, found = rwkv_jax.load(tmp_path / "other.name", scan=again)
        assert (loaded.scan, loaded.dtype, loaded.param_dtype) == (again, model.dtype, dtype)
        expected = params if again == scan else rwkv_jax.stack(params) if again else rwkv_jax.unstack(params)
        if format == "rwkv.cpp":  # its vectors are float32
            found = jax.tree.map(lambda x, y: x.astype(y.dtype), found, expected)
        assert_same(found, expected)


def test_rwkv_cpp_holds_bfloat16_as_float32_and_decays_to_their_last_bit(tmp_path):
    model, params = rwkv("bfloat16")
    decays = jnp.linspace(-1, 1, params["blocks"]["att"]["time_decay"].size)
    params["blocks"]["att"]["time_decay"] = decays.reshape(2, -1)
    rwkv_jax.save(tmp_path / "m", model, params, format="rwkv.cpp")
    _, found = rwkv_jax.load(tmp_path / "m")
    np.testing.assert_allclose(found["blocks"]["att"]["time_decay"].ravel(), decays, rtol=0, atol=6e-8)
    found["blocks"]["att"]["time_decay"] = params["blocks"]["att"]["time_decay"]
    assert_same(found, jax.tree.map(lambda x: x.astype(jnp.float32), params))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["rwkv4", "transformer", "hybrid"])
def test_a_safetensors_file_carries_any_model(tmp_path, kind, scan):
    model, params = made(kind)
    model = model.clone(scan=scan, dropout=0.25, dtype="bfloat16")
    period = len(model.layers)
    rwkv_jax.save(tmp_path / "m.safetensors", model, params if scan else rwkv_jax.unstack(params))
    for again in (True, False):
        loaded, found = rwkv_jax.load(tmp_path / "m.safetensors", scan=again)
        assert loaded == model.clone(scan=again)
        assert_same(found if again else rwkv_jax.stack(found, period), params)
    half, found = rwkv_jax.load(tmp_path / "m.safetensors", dtype="float16")
    assert (half.dtype, half.param_dtype, found["head"]["kernel"].dtype) == ("float32", "float16", jnp.float16)


def test_the_library_reads_what_is_written_and_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng(0)
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int8", "uint16", "bool")
    tensors = {name: (rng.normal(size=(3, 5)) * 9).astype(jnp.dtype(name)) for name in kinds}
    tensors |= {"transposed": tensors["float32"].T, "skálár": np.float32(2.5), "empty": np.zeros((0, 3), np.float16)}
    safetensors_file.write(path, tensors, {"key": "value"})
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"key": "value"}
    for found in (safetensors.numpy.load_file(path), safetensors_file.read(path)[0]):
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
            assert found[name].tobytes() == x.tobytes(), name
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, path)
    found, metadata = safetensors_file.read(path)
    assert metadata == {}
    assert all(found[name].tobytes() == x.tobytes() for name, x in tensors.items())
    assert not found["float32"].flags.owndata and not found["float32"].flags.writeable


# ---- folders for transformers


def test_names_of_transformers_are_another_spelling_of_the_official_ones():
    _, params = rwkv()
    official = interop.to_official(params)
    theirs = {name: huggingface.to_transformers(name) for name in official}
    assert theirs["blocks.0.ln0.bias"] == "rwkv.blocks.0.pre_ln.bias"
    assert theirs["blocks.1.att.time_mix_r"] == "rwkv.blocks.1.attention.time_mix_receptance"
    assert theirs["blocks.1.ffn.time_mix_k"] == "rwkv.blocks.1.feed_forward.time_mix_key"
    assert (theirs["emb.weight"], theirs["head.weight"]) == ("rwkv.embeddings.weight", "head.weight")
    assert [huggingface.to_official_name(name) for name in theirs.values()] == list(official)


def as_transformers_writes(folder, params, parts, suffix, prefix=""):
    """A folder with the weights in `parts` files, safetensors or pickled, and config.json."""
    tensors = {huggingface.to_transformers(name): x for name, x in interop.to_official(params).items()}
    tensors = {prefix + name: np.ascontiguousarray(x) for name, x in tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "rwkv", "hidden_size": 8, "rescale_every": 6}')
    write = safetensors.numpy.save_file if suffix == "safetensors" else lambda x, path: pth.write(path, x)
    name = "model" if suffix == "safetensors" else "pytorch_model"
    if parts == 1:
        return write(tensors, folder / f"{name}.{suffix}")
    files = [f"{name}-{i + 1:05}-of-{parts:05}.{suffix}" for i in range(parts)]
    for i, file in enumerate(files):
        write({key: tensors[key] for key in list(tensors)[i::parts]}, folder / file)
    index = {"weight_map": {key: files[i % parts] for i, key in enumerate(tensors)}}
    (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_folders_of_every_kind_are_read(tmp_path, suffix, parts):
    _, params = rwkv()
    as_transformers_writes(tmp_path / "m", params, parts, suffix, prefix="_forward_module.")
    assert_same(rwkv_jax.load(tmp_path / "m")[1], params)
    file = next((tmp_path / "m").glob(f"*.{suffix}"))
    if parts == 1:
        assert_same(rwkv_jax.load(file)[1], params)
    file.unlink()
    with pytest.raises(ValueError, match=r"one of its 3 parts, is missing|a config.json without weights") as error:
        rwkv_jax.load(tmp_path / "m")
    one_line(error)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "rwkv5"}, "model_type is 'rwkv5'; only 'rwkv'"),
        ({"attention_hidden_size": 16}, "attention_hidden_size is 16; RWKV-4 as released has 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; RWKV-4 as released has False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; RWKV-4 as released has 1e-05"),
    ],
)
def test_a_folder_that_our_model_cannot_carry_is_refused(tmp_path, config, message):
    model, params = rwkv()
    rwkv_jax.save(tmp_path / "m", model, params)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=message) as error:
        rwkv_jax.load(tmp_path / "m")
    one_line(error)


@pytest.mark.parametrize("name", ["../m/model.safetensors", "/etc/passwd", "", "a b", 7, None])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"does not name files of the folder|is missing") as error:
        rwkv_jax.load(tmp_path)
    one_line(error)


def test_large_models_are_written_in_parts(tmp_path, monkeypatch):
    model, params = rwkv()
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 3000)
    rwkv_jax.save(tmp_path / "m", model, params)
    parts = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(parts) > 2 and parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for part in parts:
        with safetensors.safe_open(part, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
        found = safetensors.numpy.load_file(part)
        assert sum(x.nbytes for x in found.values()) <= 3000
        assert all(index["weight_map"][name] == part.name for name in found)
    assert_same(rwkv_jax.load(tmp_path / "m")[1], params)


def test_a_tensor_above_the_limit_has_a_file_of_its_own():
    tensors = {name: np.zeros(size, np.uint8) for name, size in zip("abcde", (4, 6, 12, 3, 8), strict=True)}
    assert list(huggingface.split(tensors, 10)) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_folder_appears_whole_and_keeps_what_is_not_weights(tmp_path, monkeypatch):
    model, params = rwkv()
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 3000)
    rwkv_jax.save(tmp_path / "m", model, params)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    monkeypatch.undo()
    twice = jax.tree.map(lambda x: x * 2, params)
    broken = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(safetensors_file, "write", broken)
        rwkv_jax.save(tmp_path / "m", model, twice)
    assert_same(rwkv_jax.load(tmp_path / "m")[1], params)
    rename = pathlib.Path.rename
    only_the_old = lambda old, new: rename(old, new) if old.name == "m" or old.suffix == ".old" else broken()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(pathlib.Path, "rename", only_the_old)
        rwkv_jax.save(tmp_path / "m", model, twice)
    assert_same(rwkv_jax.load(tmp_path / "m")[1], params)
    rwkv_jax.save(tmp_path / "m", model, twice)
    assert_same(rwkv_jax.load(tmp_path / "m")[1], twice)
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("found", ["file", "folder", "workdir", "link"])
def test_what_is_no_folder_of_a_model_is_never_replaced(tmp_path, found):
    model, params = rwkv()
    path = tmp_path / "m"
    if found == "file":
        path.write_text("precious")
    elif found == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / "config.json").write_text('{"model": {"name": "rwkv4"}}' if found == "workdir" else "precious")
    before = [path.lstat().st_ino, *tmp_path.rglob("*")]
    with pytest.raises(FileExistsError, match="exists and is no folder of an RWKV model") as error:
        rwkv_jax.save(path, model, params)
    one_line(error)
    assert [path.lstat().st_ino, *tmp_path.rglob("*")] == before


# ---- rwkv.cpp


def test_an_rwkv_cpp_file_byte_by_byte(tmp_path):
    """The layout as its documentation gives it, on the smallest pieces."""
    tensors = {
        "emb.weight": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
        "blocks.0.att.time_decay": np.array([-2, 3], np.float32),
        "blocks.0.att.time_mix_k": np.array([[[0.25, 0.5]]], np.float32),
        "head.weight": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
    }
    for half, letter in ((0, "f"), (1, "e")):
        dtype = np.dtype(f"<{letter}{4 - 2 * half}" if letter == "f" else "<f2")
        stored = tensors | {name: tensors[name].astype(dtype) for name in ("emb.weight", "head.weight")}
        expected = struct.pack("<6i", 0x67676D66, 101, 3, 2, 1, half)
        expected += struct.pack("<5i", 2, 10, half, 2, 3) + b"emb.weight" + struct.pack(f"<6{letter}", *range(1, 7))
        expected += struct.pack("<4i", 1, 23, 0, 2) + b"blocks.0.att.time_decay"
        expected += np.array([-np.exp(-2.0), -np.exp(3.0)], "<f4").tobytes()
        expected += struct.pack("<4i", 1, 23, 0, 2) + b"blocks.0.att.time_mix_k" + struct.pack("<2f", 0.25, 0.5)
        expected += struct.pack("<5i", 2, 11, half, 2, 3) + b"head.weight" + struct.pack(f"<6{letter}", *range(1, 7))
        rwkv_cpp.write(tmp_path / "m", stored)
        assert (tmp_path / "m").read_bytes() == expected
        for version in (100, 101):
            (tmp_path / "m").write_bytes(expected[:4] + struct.pack("<i", version) + expected[8:])
            found = rwkv_cpp.read(tmp_path / "m")
            assert all(found[name].tobytes() == x.tobytes() for name, x in stored.items())
            assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in stored.items()}


# ---- the hub and the command line


def lay_out_cache(home, repo, files):
    """A cache of huggingface_hub that holds `files` of `repo`."""
    folder = home / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for name, path in files.items():
        target = folder / "snapshots" / ("0" * 40) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)


def test_names_on_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    model, params = rwkv()
    rwkv_jax.save(tmp_path / "m", model, params)
    rwkv_jax.save(tmp_path / "m.pth", model, params)
    lay_out_cache(tmp_path / "hub", "org/folder", {name.name: name for name in (tmp_path / "m").iterdir()})
    lay_out_cache(tmp_path / "hub", "org/files", {"deep/m.pth": tmp_path / "m.pth"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert_same(rwkv_jax.load("org/folder")[1], params)
    assert_same(rwkv_jax.load("org/files/deep/m.pth")[1], params)
    for name, message in (
        ("org/absent", "org/absent: no such file here, not in the hub's cache, and the hub was not reached"),
        ("org/files/absent.pth", "not in the hub's cache"),
        ("org/files", "the hub has it without model.safetensors"),
    ):
        with pytest.raises(OSError, match=message) as error:
            rwkv_jax.load(name)
        one_line(error)


def test_a_model_of_the_hub_comes_with_its_tokenizer_on_every_command_line(tmp_path, monkeypatch, capsys):
    rwkv_jax.save(tmp_path / "m", *made("rwkv4", vocab_size=256))
    tokenizers.save(tokenizers.get_tokenizer("bytes"), tmp_path / "m")
    lay_out_cache(tmp_path / "hub", "org/folder", {name.name: name for name in (tmp_path / "m").iterdir()})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "text").write_text("some text")
    assert generate_command(["--model=org/folder", "--prompt=a", "--max_new_tokens=2"]) == 0
    assert evaluate.main(["--model=org/folder", f"--data={tmp_path / 'text'}", "--seq_len=4"]) == 0
    assert "guessed" not in capsys.readouterr().err


def test_nothing_local_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name: pytest.fail(f"looked up {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert interop.locate("runs/one") == interop.locate(tmp_path / "runs" / "one").relative_to(tmp_path)
    for name in ("runs/two", "elsewhere/m.pth", "m.pth", "./org/name", "/org/name", "a/b/c", "org/..", "~/a"):
        with pytest.raises(FileNotFoundError, match="no such file or folder; expected weights"):
            interop.locate(name)


def test_the_command_line_writes_every_format(tmp_path, monkeypatch, capsys):
    model, params = rwkv()
    source = tmp_path / "source.pth"
    rwkv_jax.save(source, model, params)
    for format, name in NAMES.items():
        arguments = ["--format", format] if format == "rwkv.cpp" else []
        assert command_line.main([str(source), str(tmp_path / name), *arguments]) == 0
        assert_same(rwkv_jax.load(tmp_path / name)[1], params)
    assert command_line.main([str(source), str(tmp_path / "m.bin")]) == 2
    assert "cannot write format 'bin'" in capsys.readouterr().err
