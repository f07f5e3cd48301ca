"""Folders for transformers and back, judged by transformers on random weights."""

import jax
import numpy as np
import pytest
from small import drawn, forward

import rwkv_jax
from rwkv_jax.interop import huggingface

pytestmark = pytest.mark.live
SIZES = [(50, 3, 32, 96), (17, 8, 16, 64)]  # V, L, D, F; 8 layers pass transformers' rescaling


def random_model(V, L, D, F):
    model = rwkv_jax.build("rwkv4", vocab_size=V, num_layers=L, dim=D, hidden_dim=F, matmul_precision="highest")
    return drawn(model, scale=0.2)


def tokens(V, T=24):
    return np.random.default_rng(0).integers(0, V, (1, T), dtype=np.int32)


def our_logits(model, params, tokens_BT):
    return np.asarray(forward(model, params, tokens_BT)[0])


def their_logits(theirs, tokens_BT):
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(tokens_BT).long()).logits.float().numpy()


def assert_close(actual, expected):
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def from_pretrained(path, **kw):
    from transformers import RwkvForCausalLM

    theirs, report = RwkvForCausalLM.from_pretrained(path, output_loading_info=True, **kw)
    assert not any(report.values()), report
    return theirs.eval()


@pytest.mark.parametrize("sizes, limit", [(SIZES[0], 5 * 10**9), (SIZES[1], 20_000)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_save_for_transformers_has_equal_logits_and_loads_back(tmp_path, monkeypatch, sizes, limit):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", limit)
    model, params = random_model(*sizes)
    rwkv_jax.save(tmp_path / "ours", model, params)
    theirs = from_pretrained(tmp_path / "ours")
    tokens_BT = tokens(sizes[0])
    assert_close(our_logits(model, params, tokens_BT), their_logits(theirs, tokens_BT))
    theirs.save_pretrained(tmp_path / "theirs")  # after a forward pass, which rescales nothing by our config
    _, again = rwkv_jax.load(tmp_path / "theirs")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@pytest.mark.parametrize("sizes, shard", [(SIZES[0], "5GB"), (SIZES[1], "20KB")], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_load_of_a_transformers_folder_has_equal_logits(tmp_path, sizes, shard):
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    V, L, D, F = sizes
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, intermediate_size=F, rescale_every=0)
    theirs = RwkvForCausalLM(config).eval()
    for x in theirs.parameters():
        x.data += 0.1 * torch.randn_like(x)
    tokens_BT = tokens(V)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert ("index.json" in str(list((tmp_path / "theirs").iterdir()))) == (shard == "20KB")
    model, params = rwkv_jax.load(tmp_path / "theirs")
    assert (model.vocab_size, model.num_layers, model.dim, model.hidden_dim) == sizes
    assert_close(our_logits(model, params, tokens_BT), their_logits(theirs, tokens_BT))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    _, again = rwkv_jax.load(tmp_path / "pytorch_model.bin")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore")
def test_save_for_transformers_keeps_half_precision_bit_exactly(tmp_path, dtype):
    import torch

    model, params = random_model(*SIZES[1])
    rwkv_jax.save(tmp_path / "m.pth", model, params)
    half, params = rwkv_jax.load(tmp_path / "m.pth", dtype=dtype)
    rwkv_jax.save(tmp_path / "ours", half, params)
    theirs = from_pretrained(tmp_path / "ours")
    assert theirs.dtype == getattr(torch, dtype)
    assert theirs.config.rescale_every == (6 if dtype == "float16" else 0)
    theirs.save_pretrained(tmp_path / "theirs")
    _, again = rwkv_jax.load(tmp_path / "theirs")
    for (path, x), y in zip(jax.tree.leaves_with_path(again), jax.tree.leaves(params), strict=True):
        if path[-1].key not in ("time_decay", "time_first"):  # transformers may round these to its own dtype
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.filterwarnings("ignore")
def test_load_reports_a_transformers_folder_saved_after_a_forward_pass(tmp_path, capsys):
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 13, "intermediate_size": 64}
    theirs = RwkvForCausalLM(RwkvConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "before")
    their_logits(theirs, tokens(16))
    theirs.save_pretrained(tmp_path / "after")
    capsys.readouterr()
    for name, lines in (("before", 0), ("after", 1)):
        rwkv_jax.load(tmp_path / name)
        assert capsys.readouterr().err.count("look divided by 2 from layer 6 on, 4 from 12 on, ...") == lines
