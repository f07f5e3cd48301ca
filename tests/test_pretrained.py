"""The object interface: model, parameters and tokenizer in one value."""

import jax
import numpy as np
import pytest
from generating import KINDS, NEARLY_GREEDY, B, assert_equal, assert_near, ids, unstacked, whole
from judge import error_ratio
from scipy import special
from small import made

import rwkv_jax
from rwkv_jax import evaluate
from rwkv_jax.data import tokenizers
from rwkv_jax.generate import decode, sampling

TEXT = "One morning, when Gregor Samsa woke from troubled dreams.\n" * 2
PROGRAMS = 50  # half of them only place loaded weights on the device, one for each shape
encoded = lambda text: list(text.encode())
decoded = lambda tokens: bytes(tokens).decode(errors="replace")


def lm(kind="rwkv4"):
    return rwkv_jax.RWKVForCausalLM(*unstacked(kind), tokenizers.get_tokenizer("bytes"))


@pytest.fixture
def short_segments(monkeypatch):
    """Scores texts in segments and embeds them in chunks that are shorter than the texts."""
    monkeypatch.setattr(evaluate, "SEGMENTS", (32,))
    monkeypatch.setattr(decode, "FIRST_CHUNKS", (32,))
    monkeypatch.setattr(decode, "PROMPT_CHUNK", 32)
    assert len(TEXT) > 3 * 32


def test_pretrained_generate_returns_text_ids_or_lists_as_given():
    loaded, settings = lm(), {"max_new_tokens": 8} | NEARLY_GREEDY
    ids = loaded.generate([72, 105], **settings)
    assert len(ids) == 8 and all(isinstance(token, int) for token in ids)
    text = loaded.generate("Hi", **settings)
    assert text == decoded(ids) == "".join(loaded.stream("Hi", **settings))
    assert loaded.generate(["Hi"] * B, **settings) == [text] * B
    assert loaded.generate([[72, 105]] * B, **settings) == [ids] * B
    assert loaded.generate(np.array([[72, 105]]), **settings) == [ids]
    assert loaded.generate(["Hi"], max_new_tokens=[3], **NEARLY_GREEDY) == [decoded(ids[:3])]
    assert loaded.generate([72, 105], stop=text[3:5], **settings) == encoded(text[: text.index(text[3:5])])
    assert loaded.generate("Hi", max_new_tokens=8, sampler=sampling.sampler(**NEARLY_GREEDY)) == text
    assert len({loaded.generate("Hi", seed=seed, max_new_tokens=20) for seed in (0, 1)}) == 2


def test_pretrained_generate_ends_at_the_separator_by_default():
    nothing_else = {"logit_bias": {0: 1e6}, "max_new_tokens": 3}
    assert lm().generate([72], **nothing_else) == []
    assert lm().generate([72], stop_tokens=(), **nothing_else) == [0, 0, 0]
    assert "".join(lm().stream("H", **nothing_else)) == ""
    assert "".join(lm().stream("H", stop_tokens=(), **nothing_else)) == "\0\0\0"


def test_pretrained_generate_and_stream_continue_a_context():
    loaded, settings = lm(), {"max_new_tokens": 6} | NEARLY_GREEDY
    context = loaded.read("One mor")
    at_once = loaded.generate("One morning, when", **settings)
    assert loaded.generate("ning, when", context=context, **settings) == at_once
    assert "".join(loaded.stream("ning, when", context=context, **settings)) == at_once
    text, after = loaded.generate("One morning, when", return_context=True, max_new_tokens=3, **NEARLY_GREEDY)
    assert text + loaded.generate("", context=after, max_new_tokens=3, **NEARLY_GREEDY) == at_once


def test_pretrained_generate_compiles_no_program_for_other_prompts(compiled):
    """One program for each length of a first chunk, and one that decodes, are enough for all prompts and settings."""
    loaded = lm()

    def use(lengths, **settings):
        for length in lengths:
            prompt = [token % 128 for token in ids(length, seed=length)]
            loaded.generate(prompt, max_new_tokens=length % 7 + 1, **settings)
            loaded.generate(
                prompt, context=loaded.read(decoded(prompt)), max_new_tokens=decode.DISPATCH + 1, **settings
            )
            list(loaded.stream(decoded(prompt), max_new_tokens=3, **settings))

    use(decode.FIRST_CHUNKS, stop_tokens=())
    compiled()
    use((1, 7, 16, 17, 64, 65, 256, 257, 530), stop_tokens=())
    for seed, settings in enumerate(({"temperature": 0.7}, {"temperature": 1.3, "penalty_decay": 0.5}), 1):
        use((100,), seed=seed, stop_tokens=range(200, 200 + seed), **settings)
    assert compiled() == 0


def test_pretrained_logits_equal_one_full_pass_of_text_and_ids():
    """A list gives a list. An empty text gives the logits after the separator."""
    texts = ["Hi", "One mo", "m"]
    expected, context = whole(*unstacked("rwkv4"), [encoded(text) for text in texts])
    found, after = lm().logits(texts)
    assert isinstance(found, list) and [x.shape for x in found] == [(2, 256), (6, 256), (1, 256)]
    for actual_TV, expected_TV in zip(found, expected, strict=True):
        assert error_ratio(actual_TV, expected_TV) < 1e-5
    assert_near(after, context)
    for given in (texts[0], encoded(texts[0]), np.array(encoded(texts[0]), np.uint16)):
        found, after = lm().logits(given)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert error_ratio(found, expected[0]) < 1e-5
    (expected, *_), _ = whole(*unstacked("rwkv4"), [[0, *encoded(texts[0])]])
    found, after = lm().logits("")
    assert error_ratio(found, expected[:1]) < 1e-5
    assert error_ratio(lm().logits(texts[0], after)[0], expected[1:]) < 1e-5


@KINDS
def test_pretrained_score_gives_log_likelihoods_for_any_batch_and_cut(kind, short_segments):
    model, ids = lm(kind), encoded(TEXT)
    (logits_TV,), _ = whole(*unstacked(kind), [[0, *ids]])
    expected = special.log_softmax(np.float64(logits_TV[:-1]), axis=-1)[np.arange(len(ids)), ids]
    context = model.read([0, *ids[:15]])
    for actual, wanted in (
        *zip(model.score([TEXT[:5], TEXT, TEXT[:1]]), (expected[:5], expected, expected[:1]), strict=True),
        (model.score(TEXT), expected),
        (model.score(ids[:1]), expected[:1]),
        (model.score(ids[15:], context), expected[15:]),
        (model.score(ids[15:], context), expected[15:]),  # the context is unchanged
    ):
        np.testing.assert_allclose(actual, wanted, atol=2e-4)


@KINDS
def test_pretrained_embed_gives_the_mean_of_the_inputs_of_the_head(kind, short_segments):
    model, params = unstacked(kind)
    hidden = jax.jit(lambda ids_BT: model.apply({"params": params}, ids_BT, method="hidden"))
    hidden_TD = np.asarray(hidden(np.array([encoded(TEXT)]))[0][0], np.float64)
    short_D, long_D, cut_D = lm(kind).embed(["short", TEXT, TEXT[:40]])
    assert error_ratio(long_D, hidden_TD.mean(axis=0)) < 1e-5
    assert error_ratio(cut_D, hidden_TD[:40].mean(axis=0)) < 1e-5
    assert error_ratio(lm(kind).embed(TEXT), long_D) < 1e-5
    assert error_ratio(lm(kind).embed("short"), short_D) < 1e-5
    after = lm(kind).embed(TEXT[16:], lm(kind).read(TEXT[:16]))
    assert error_ratio(after, hidden_TD[16:].mean(axis=0)) < 1e-5


def test_from_pretrained_inverts_save_pretrained(tmp_path):
    lm().save_pretrained(tmp_path / "folder")
    again = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "folder")
    assert again.tokenizer.name == "bytes" and again.model == lm().model
    assert_equal(again.params, lm().params)
    context = lm().read("One morning")
    lm().save_context(tmp_path / "context", context, "One morning")
    found, text = again.load_context(tmp_path / "context")
    assert text == "One morning"
    assert_equal(found, context)
    half = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "folder", dtype="bfloat16")
    assert half.params["head"]["kernel"].dtype == "bfloat16" and half.model.dtype == "bfloat16"
    assert isinstance(half.generate("Hi", max_new_tokens=4), str)


def test_pretrained_without_a_tokenizer_reads_and_writes_ids_alone(tmp_path, capsys):
    rwkv_jax.save(tmp_path / "model.pth", *made("rwkv4", scan=False))  # a vocabulary of 11 tokens
    loaded = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "model.pth")
    err = capsys.readouterr().err
    assert err.endswith("; continued without a tokenizer\n") and err.count("\n") == 1
    for use in (loaded.generate, loaded.stream, loaded.read, loaded.logits, loaded.score, loaded.embed):
        with pytest.raises(ValueError, match="loaded without a tokenizer"):
            use("text")
    with pytest.raises(FileNotFoundError):
        rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "model.pth", tokenizer="absent.json")
    ids_only = rwkv_jax.RWKVForCausalLM(*unstacked("rwkv4"))
    assert len(ids_only.generate([1, 2], max_new_tokens=3, stop_tokens=())) == 3


def test_pretrained_names_mistakes():
    for use, arguments, message in (
        (lm().generate, (["text", [1, 2]],), "texts and ids"),
        (lm().score, (["text", "", "a"],), "nothing to score"),
        (lm().embed, ("",), "nothing to embed"),
        (lm().score, (["a", "b"], lm().read("text")), "the context holds 1 texts"),
        (lm().score, ([72, 256],), "holds token 256, expected ids from 0 to 255"),
        (lm().score, ([-1],), "holds token -1"),  # as an index NumPy would count it from the end
        (lm().embed, ([1.5],), "expected ids"),
        (lm().embed, ([[72], [2**40]],), "holds token 1099511627776"),
    ):
        with pytest.raises(ValueError, match=message):
            use(*arguments)
    with pytest.raises(TypeError, match="do_sample"):
        lm().generate("text", do_sample=True)
