"""Folders for transformers: names, parts, refusals, and atomic replacement of a folder."""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from weights import D, F, L, V, assert_same_params, assert_same_tensors, official, one_line, tiny

import rwkv_jax
from rwkv_jax import interop
from rwkv_jax.interop import huggingface, pth, safetensors_file


def as_transformers_writes(folder, params, parts, suffix, prefix=""):
    """A folder with the weights in `parts` files, safetensors or pickled, and config.json."""
    names = {name: huggingface.to_transformers(name) for name in official()}
    assert [huggingface.to_official_name(name) for name in names.values()] == list(names)
    tensors = {names[name]: x for name, x in interop.to_official(params).items()}
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
def test_load_reads_a_huggingface_folder_of_any_kind_of_files(tmp_path, suffix, parts):
    _, params = tiny()
    as_transformers_writes(tmp_path / "m", params, parts, suffix, prefix="_forward_module.")
    assert_same_params(rwkv_jax.load(tmp_path / "m")[1], params)
    file = next((tmp_path / "m").glob(f"*.{suffix}"))
    if parts == 1:
        assert_same_params(rwkv_jax.load(file)[1], params)
    file.unlink()
    with one_line(r"one of its 3 parts, is missing|a config.json without weights"):
        rwkv_jax.load(tmp_path / "m")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "rwkv5"}, "model_type is 'rwkv5'; only 'rwkv'"),
        ({"attention_hidden_size": 16}, "attention_hidden_size is 16; RWKV-4 as released has 8"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; RWKV-4 as released has 1e-05"),
    ],
)
def test_load_refuses_a_huggingface_config_of_another_model(tmp_path, config, message):
    huggingface.write(tmp_path / "m", official())
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with one_line(message):
        rwkv_jax.load(tmp_path / "m")


@pytest.mark.parametrize("dtype, rescale_every", [("float32", 0), ("bfloat16", 0), ("float16", 6)])
def test_huggingface_write_has_transformers_names_sizes_and_rescaling(tmp_path, dtype, rescale_every):
    huggingface.write(tmp_path / "m", official(jnp.dtype(dtype)))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "attention_hidden_size", "intermediate_size")
    assert [config[name] for name in sizes] == [V, L, D, D, F]
    assert (config["torch_dtype"], config["rescale_every"]) == (dtype, rescale_every)
    tensors, metadata = safetensors_file.read(tmp_path / "m" / "model.safetensors")
    assert metadata == {"format": "pt"} and {name.split(".")[0] for name in tensors} == {"rwkv", "head"}
    layer = {"pre_ln.bias", "attention.time_mix_receptance", "feed_forward.time_mix_key", "attention.key.weight"}
    assert {"rwkv.embeddings.weight", "head.weight", *(f"rwkv.blocks.0.{name}" for name in layer)} <= set(tensors)


@pytest.mark.parametrize("layers, every", [(14, 6), (7, 6), (9, 3)])
def test_load_reports_a_huggingface_folder_saved_after_a_forward_pass(tmp_path, capsys, layers, every):
    tensors, folder = official(num_layers=layers), tmp_path / "m"

    def printed(divide, **config):
        """Lines printed while loading the folder; its matrices also grow from layer to layer by themselves."""
        size = lambda i: 1.2**i / 2 ** (i // every * divide)
        divided = {f"blocks.{i}.{name}.weight": size(i) for i in range(layers) for name in ("att.output", "ffn.value")}
        huggingface.write(folder, {name: x * np.float32(divided.get(name, 1)) for name, x in tensors.items()})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        rwkv_jax.load(folder)
        return capsys.readouterr().err

    line = printed(True, rescale_every=every)
    assert line.startswith(f"{folder}: att.output and ffn.value look divided by 2 from layer {every} on")
    assert line.count("\n") == 1
    (folder / "model.safetensors").rename(tmp_path / "alone.safetensors")  # still with transformers' names
    rwkv_jax.load(tmp_path / "alone.safetensors")
    (alone,) = capsys.readouterr().err.splitlines()
    assert alone.startswith(
        f"{tmp_path / 'alone.safetensors'}: att.output and ffn.value look divided by 2 from layer 6"
    )
    assert printed(False, rescale_every=every) == ""
    assert printed(True, rescale_every=0) == printed(True, rescale_every=layers) == ""


@pytest.mark.parametrize("name", ["../m/model.safetensors", "m/../../model.safetensors", "/etc/passwd", 7])
def test_load_refuses_a_huggingface_index_that_names_files_elsewhere(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with one_line(r"does not name files of the folder|7, one of its 1 parts, is missing"):
        rwkv_jax.load(tmp_path)


def test_save_writes_large_huggingface_folders_in_parts(tmp_path, monkeypatch):
    model, params = tiny()
    tensors = interop.to_official(params)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 3000)
    rwkv_jax.save(tmp_path / "m", model, params)
    parts = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(parts) > 2 and parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for part in parts:
        found = safetensors.numpy.load_file(part)
        assert sum(x.nbytes for x in found.values()) <= 3000
        assert all(index["weight_map"][name] == part.name for name in found)
    assert_same_params(rwkv_jax.load(tmp_path / "m")[1], params)


def test_huggingface_write_replaces_a_folder_atomically_and_keeps_other_files(tmp_path, monkeypatch):
    once = official()
    twice = {name: x * 2 for name, x in once.items()}
    read = lambda: huggingface.named_officially(huggingface.read(tmp_path / "m"))[0]
    holds = lambda tensors: assert_same_tensors(read(), tensors)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 3000)
    huggingface.write(tmp_path / "m", once)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    monkeypatch.undo()
    broken = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(safetensors_file, "write", broken)
        huggingface.write(tmp_path / "m", twice)
    holds(once)
    rename = pathlib.Path.rename
    only_the_old = lambda old, new: rename(old, new) if old.name == "m" or old.suffix == ".old" else broken()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(pathlib.Path, "rename", only_the_old)
        huggingface.write(tmp_path / "m", twice)
    holds(once)
    huggingface.write(tmp_path / "m", twice)
    holds(twice)
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["m"]


def test_save_never_replaces_anything_but_a_folder_of_a_model(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, config in {"folder": "precious", "workdir": '{"model": {"name": "rwkv4"}}'}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    for name in ("file", "link", "folder", "workdir"):
        with one_line("exists and is not a folder of an RWKV model", FileExistsError):
            rwkv_jax.save(tmp_path / name, *tiny())
    with one_line("/proc is a mount point, which cannot be replaced; name a folder inside it", FileExistsError):
        rwkv_jax.save("/proc", *tiny())
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before


def test_save_refuses_the_current_folder_which_it_would_replace(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    with one_line(". is the current folder, which cannot be replaced; name a folder inside it", FileExistsError):
        rwkv_jax.save(".", *tiny(), format="huggingface")
