"""Files of every version with the World vocabulary: `load` detects all it needs to use them."""

import io

import jax
import numpy as np
import pytest
from generating import NEARLY_GREEDY, assert_equal
from scipy import special
from small import forward, made

import rwkv_jax
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.generate import load_context
from rwkv_jax.generate.__main__ import main

KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("rwkv4", "rwkv5", "rwkv6")] + ["rwkv7"]
TEXT = "Hello world: 日本"


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    pytest.importorskip("pyrwkv_tokenizer", reason="the World tokenizer is an extra")
    path = tmp_path_factory.mktemp("weights") / "m.pth"
    rwkv_jax.save(path, *made(request.param, vocab_size=WorldTokenizer.vocab_size))
    return path


def test_pretrained_world_model_generates_scores_embeds_and_saves_contexts(path, tmp_path, capsys):
    lm = rwkv_jax.RWKVForCausalLM.from_pretrained(path)
    assert capsys.readouterr().err == f"{path} has no tokenizer: world, guessed from its vocabulary of 65536\n"
    assert isinstance(lm.tokenizer, WorldTokenizer)
    text = lm.generate(TEXT, max_new_tokens=6, **NEARLY_GREEDY)
    assert text and "".join(lm.stream(TEXT, max_new_tokens=6, **NEARLY_GREEDY)) == text

    context = lm.read(TEXT)
    lm.save_context(tmp_path / "context", context, TEXT)
    found, said = lm.load_context(tmp_path / "context")
    assert said == TEXT
    assert_equal(found, jax.device_get(context))
    assert lm.generate("", context=found, max_new_tokens=6, **NEARLY_GREEDY) == text

    ids = lm.tokenizer.encode(TEXT)
    logits_TV = np.float64(forward(lm.model, lm.params, np.int32([[0, *ids]]))[0][0])
    expected = special.log_softmax(logits_TV[:-1], axis=-1)[np.arange(len(ids)), ids]
    np.testing.assert_allclose(lm.score(TEXT), expected, atol=1e-4)
    assert lm.embed(TEXT).shape == (lm.model.dim,) and np.isfinite(lm.embed(TEXT)).all()


def test_chat_of_a_world_model_uses_the_names_of_its_version(path, tmp_path, capsys, monkeypatch):
    typed = f"Good day\n/save {tmp_path / 'talk'}\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert main([f"--model={path}", "--chat", "--max_new_tokens=4"]) == 0
    capsys.readouterr()
    lm = rwkv_jax.RWKVForCausalLM.from_pretrained(path)
    _, text = load_context(tmp_path / "talk", lm.model, lm.params)
    user, assistant = ("Question", "Answer") if lm.model.layers == ("rwkv4",) else ("User", "Assistant")
    assert text.startswith(f"{user}: Good day\n\n{assistant}:")
