"""`python -m rwkv_jax.interop`."""

import jax.numpy as jnp
import numpy as np
from small import drawn, make
from weights import NAMES, D, V, assert_same_params, official, tiny, write_workdir

import rwkv_jax
from rwkv_jax.interop import pth
from rwkv_jax.interop.__main__ import main


def test_interop_command_writes_every_format(tmp_path, capsys):
    model, params = tiny()
    source = tmp_path / "source.pth"
    rwkv_jax.save(source, model, params)
    for format, name in NAMES.items():
        arguments = ["--format", format] if format == "rwkv.cpp" else []
        assert main([str(source), str(tmp_path / name), *arguments]) == 0
        assert_same_params(rwkv_jax.load(tmp_path / name)[1], params)
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"wrote {tmp_path / name}, ")
    assert main([str(source), str(tmp_path / "m.bin")]) == 2
    assert "cannot write format 'bin'" in capsys.readouterr().err


def test_interop_command_converts_a_workdir_and_names_a_damaged_file(tmp_path, capsys):
    write_workdir(tmp_path / "run", *tiny(), 1)
    target = tmp_path / "model.pth"
    assert main([str(tmp_path / "run"), str(target), "--dtype", "bfloat16"]) == 0
    assert pth.read(target)["emb.weight"].dtype == jnp.bfloat16
    target.write_bytes(target.read_bytes()[:-100])
    capsys.readouterr()
    assert main([str(target), str(tmp_path / "other.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "other.pth").exists()


def test_interop_command_refuses_a_cast_to_infinity(tmp_path, capsys):
    tensors = official()
    tensors["blocks.1.att.key.weight"][2, 3] = -1e5
    pth.write(tmp_path / "model.pth", tensors)
    model, params = tiny()
    write_workdir(tmp_path / "run", model, params | {"head": {"kernel": np.full((D, V), 7e4, np.float32)}}, 1)
    for source, message in (
        ("model.pth", "model.pth: blocks.1.att.key.weight holds -100000"),
        ("run", "run: head/kernel holds 70000"),
    ):
        target = tmp_path / f"{source}-half.pth"
        assert main([str(tmp_path / source), str(target), "--dtype=float16"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {tmp_path}/{message}, and the largest float16 is 65504"
        )
        assert not target.exists()
        assert main([str(tmp_path / source), str(target), "--dtype=bfloat16"]) == 0


def test_interop_command_refuses_a_format_before_it_reads_weights(tmp_path, capsys, monkeypatch):
    rwkv_jax.save(tmp_path / "m.safetensors", *drawn(make("rwkv4", variant={"receptance": False})))
    monkeypatch.setattr(rwkv_jax.runs, "load_with_training", None)
    assert main([str(tmp_path / "m.safetensors"), str(tmp_path / "m.pth")]) == 2
    assert "m.pth: pth holds released models only, and this one has receptance=False" in capsys.readouterr().err


def test_interop_command_stores_the_tokenizer_of_the_source_in_the_folder(tmp_path, capsys):
    rwkv_jax.save(tmp_path / "model.pth", *drawn(make("rwkv4", vocab_size=256)))
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "folder")]) == 0
    assert "bytes, guessed" in capsys.readouterr().err
    lm = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "folder")
    assert lm.tokenizer.encode("é") == [195, 169] and capsys.readouterr().err == ""
