"""Training workdirs as models: loaded parameters, and refusals."""

import json

import jax
import jax.numpy as jnp
import pytest
from weights import assert_same_params, one_line, tiny, write_workdir

import rwkv_jax
from rwkv_jax import runs


def test_load_of_a_workdir_gives_its_newest_valid_parameters(tmp_path, capfd):
    model, params = tiny()
    write_workdir(tmp_path, model, params, 1, 2)
    for scan in (True, False):
        loaded, found = rwkv_jax.load(tmp_path, scan=scan)
        assert loaded == model.clone(scan=scan)
        assert_same_params(found, jax.tree.map(lambda x: x * 2, tiny(scan=scan)[1]))
    half, params_half = rwkv_jax.load(tmp_path, dtype="bfloat16")
    assert (half.dtype, params_half["head"]["kernel"].dtype) == ("bfloat16", jnp.bfloat16)
    assert params_half["blocks"]["att"]["time_decay"].dtype == jnp.float32
    assert runs.describe(tmp_path) == model
    (tmp_path / "checkpoints" / "2" / "_METADATA").unlink()
    assert_same_params(rwkv_jax.load(tmp_path)[1], params)
    assert capfd.readouterr().err.count("\n") == 1


def test_load_stacks_the_layers_of_a_run_without_scan(tmp_path):
    write_workdir(tmp_path, *tiny(scan=False), 1)
    assert_same_params(rwkv_jax.load(tmp_path, scan=True)[1], tiny(scan=True)[1])


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"vocab_size": 11}', r"config.json: expected \{\"model\".*KeyError\('model'\)"),
        ('{"model": {"vocab_size": 11}}', r"config.json: expected .*KeyError\('name'\)"),
        ('{"model": {"name": "rwkv4", "vocab_size": 11, "num_layers": 2, "dim": 8}}', "no valid checkpoint"),
        ('{"model": {"name": ["rwkv4"]}}', r"config.json: unknown model name \['rwkv4'\]"),
        (
            '{"model": {"name": "rwkv4", "vocab_size": 11, "num_layers": 2, "dim": "8"}}',
            "config.json: model field dim",
        ),
        (
            '{"model": {"name": "rwkv4", "dim": 8, "num_layers": 2, "vocab_size": 2e9}}',
            "config.json: .*vocab_size is 2",
        ),
    ],
)
def test_load_names_the_mistake_in_the_config_of_a_workdir(tmp_path, config, message):
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


def test_trained_length_is_read_from_a_workdir_or_that_of_released_models(tmp_path):
    assert runs.trained_length(tmp_path / "model.pth") == 1024
    (tmp_path / "config.json").write_text('{"seq_len": 48}')
    assert runs.trained_length(tmp_path) == 48
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    assert runs.trained_length(tmp_path) == 1024
    for length in ('"x"', "0", "null", "1.5"):
        (tmp_path / "config.json").write_text(f'{{"seq_len": {length}}}')
        with one_line("config.json: seq_len is .*, expected a positive integer"):
            runs.trained_length(tmp_path)
