"""RWKV-7 by flash-linear-attention's names: reading its folders, and writing folders for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small import forward
from weights import assert_same_params, assert_same_tensors, one_line, tiny

import rwkv_jax
from rwkv_jax.interop import huggingface, safetensors_file

GOLDENS = Path(__file__).parents[1] / "goldens"
WRITTEN = GOLDENS / "fla"  # written by the library: 2 layers, 2 heads of 4 channels, random weights, and their logits


def assert_same_logits(model, params, folder):
    with np.load(folder / "logits.npz") as arrays:
        logits_BTV, _ = forward(model.clone(matmul_precision="highest"), params, arrays["tokens_BT"])
        assert np.abs(logits_BTV - arrays["logits_BTV"]).max() < 1e-5 * np.abs(arrays["logits_BTV"]).max()


def test_load_of_an_fla_folder_has_the_logits_of_the_library():
    model, params = rwkv_jax.load(WRITTEN)
    assert (model.layers, model.head_size, model.low_ranks) == (("rwkv7",), 4, (3, 5, 2, 6))
    assert model.head_norm_epsilon == 4e-5  # 1e-5 times the size of a head
    assert_same_logits(model, params, WRITTEN)


def test_save_writes_an_fla_folder_as_the_library_does(tmp_path):
    rwkv_jax.save(tmp_path / "m", *rwkv_jax.load(WRITTEN))
    tensors = lambda folder: safetensors_file.read(folder / "model.safetensors")[0]
    assert_same_tensors(tensors(tmp_path / "m"), tensors(WRITTEN))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "m", WRITTEN))
    assert ours["torch_dtype"] == theirs["dtype"] and ours["hidden_ratio"] == 3  # the ratio is ignored beside F
    others = {"bos_token_id", "eos_token_id", "hidden_ratio", "torch_dtype"}
    assert all(ours[key] == theirs[key] for key in ours.keys() - others)


def test_load_recognises_fla_names_in_a_file_of_any_format(tmp_path):
    tensors = {name: np.array(x) for name, x in safetensors_file.read(WRITTEN / "model.safetensors")[0].items()}
    model, params = rwkv_jax.load(WRITTEN)
    shutil.copy(WRITTEN / "model.safetensors", tmp_path / "m")
    first_version = dict(tensors)
    for i in range(2):
        rows = [first_version.pop(f"model.layers.{i}.attn.x_{c}")[0] for c in "rwkvag"]
        first_version[f"model.layers.{i}.attn.x_x"] = np.concatenate(rows)
    safetensors_file.write(tmp_path / "first", first_version, {})
    for name in ("m", "first"):
        loaded, found = rwkv_jax.load(tmp_path / name)
        assert loaded == model
        assert_same_params(found, params)


def test_save_writes_an_fla_folder_in_parts_and_replaces_one_of_transformers(tmp_path, monkeypatch):
    rwkv_jax.save(tmp_path / "m", *tiny())
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 3000)
    model, params = tiny("bfloat16", kind="rwkv7", head_norm_epsilon=4e-5)
    rwkv_jax.save(tmp_path / "m", model, params)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"tokenizer.json", "model.safetensors.index.json"} <= names and "model.safetensors" not in names
    assert sum(name.startswith("model-0000") for name in names) > 1
    loaded, found = rwkv_jax.load(tmp_path / "m")
    assert loaded == model
    assert_same_params(found, params)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; RWKV-7 as released has 1e-05"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; RWKV-7 as released has 'sqrelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; RWKV-7 as released has False"),
        (
            {"model_type": "rwkv6"},
            r"model_type is 'rwkv6'; only 'rwkv' \(RWKV-4\) and 'rwkv7' \(RWKV-7\) are supported",
        ),
    ],
)
def test_load_refuses_an_fla_config_of_another_model(tmp_path, config, message):
    shutil.copytree(WRITTEN, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with one_line(message):
        rwkv_jax.load(tmp_path / "m")


def test_load_of_an_fla_folder_never_reports_the_rescaling_of_rwkv4(tmp_path, capsys):
    model, params = tiny(kind="rwkv7", num_layers=7, head_norm_epsilon=4e-5)
    divisors = np.float32([1] * 5 + [2])[:, None, None]  # for layers 1 to 6; the first is stored separately
    divides = lambda path: path[-2].key in ("output", "value")
    divided = jax.tree.map_with_path(lambda path, x: x / divisors if divides(path) else x, params["blocks"])
    rwkv_jax.save(tmp_path / "m", model, params | {"blocks": divided})
    capsys.readouterr()
    rwkv_jax.load(tmp_path / "m")
    assert "divided" not in capsys.readouterr().err


@pytest.mark.live
def test_save_and_load_exchange_folders_with_fla(tmp_path, monkeypatch):
    shapes = [{"num_layers": 3, "dim": 128, "hidden_dim": 512, "head_size": 64}]
    shapes += [{"num_layers": 4, "dim": 64, "hidden_dim": 96, "head_size": 32}]
    models, folders = [], [WRITTEN, tmp_path / "again"]
    for i, (fields, limit) in enumerate(zip(shapes, (5 * 10**9, 30_000), strict=True)):
        monkeypatch.setattr(huggingface, "SHARD_BYTES", limit)
        model, params = tiny(kind="rwkv7", head_norm_epsilon=fields["head_size"] * 1e-5, **fields)
        models.append((model, jax.tree.map(lambda x: 0.6 * x, params)))
        folders += [tmp_path / f"ours{i}", tmp_path / f"theirs{i}"]
        rwkv_jax.save(folders[-2], *models[-1])
        tokens_BT = np.random.default_rng(0).integers(0, 11, (2, 24), dtype=np.int32)
        np.savez(folders[-2] / "logits.npz", tokens_BT=tokens_BT)
    command = [sys.executable, str(GOLDENS / "make_fla.py"), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same_logits(*rwkv_jax.load(WRITTEN), tmp_path / "again")
    for (model, params), theirs in zip(models, folders[3::2], strict=True):
        assert_same_logits(model, params, theirs)
        loaded, found = rwkv_jax.load(theirs)
        assert loaded.head_norm_epsilon == model.head_norm_epsilon
        assert_same_params(found, params)
