"""The object interface: model, parameters and tokenizer in one value."""

import jax
import numpy as np
import pytest
from generating import KINDS, NEARLY_GREEDY, B, assert_equal, assert_near, unstacked, whole
from judge import error_ratio
from small import made

import rwkv_jax
from rwkv_jax import evaluate
from rwkv_jax.data import tokenizers
from rwkv_jax.generate import decode, sampling

TEXT = "One morning, when Gregor Samsa woke from troubled dreams.\n" * 2
SLOW = pytest.mark.slow
PROGRAMS = 45  # half of them only place weights that were loaded, one for each shape
encoded = lambda text: list(text.encode())
decoded = lambda tokens: bytes(tokens).decode(errors="replace")


def lm(kind="rwkv4"):
    return rwkv_jax.RWKVForCausalLM(*unstacked(kind), tokenizers.get_tokenizer("bytes"))


@pytest.fixture
def short_segments(monkeypatch):
    """Texts are scored in segments and embedded in chunks that are shorter than they are."""
    monkeypatch.setattr(evaluate, "SEGMENTS", (32,))
    monkeypatch.setattr(decode, "FIRST_CHUNKS", (32,))
    monkeypatch.setattr(decode, "PROMPT_CHUNK", 32)
    assert len(TEXT) > 3 * 32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pth"
    rwkv_jax.save(path, *unstacked("rwkv4"))
    return path


def test_generate_returns_text_for_text_ids_for_ids_and_a_list_for_a_list(path):
    loaded = rwkv_jax.RWKVForCausalLM.from_pretrained(path, tokenizer="bytes")
    assert loaded.model == unstacked("rwkv4")[0]
    assert_equal(loaded.params, unstacked("rwkv4")[1])
    settings = {"max_new_tokens": 8} | NEARLY_GREEDY
    ids = loaded.generate([72, 105], **settings)
    assert len(ids) == 8 and all(isinstance(token, int) for token in ids)
    text = loaded.generate("Hi", **settings)
    assert text == decoded(ids)
    assert loaded.generate(["Hi"] * B, **settings) == [text] * B
    assert loaded.generate([[72, 105]] * B, **settings) == [ids] * B
    assert loaded.generate(np.array([[72, 105]]), **settings) == [ids]
    assert "".join(loaded.stream("Hi", **settings)) == text
    assert loaded.generate(["Hi"], max_new_tokens=[3], **NEARLY_GREEDY) == [decoded(ids[:3])]


def test_generate_takes_a_seed_or_a_sampler():
    assert len({lm().generate("Hi", seed=seed, max_new_tokens=20) for seed in (0, 1)}) == 2
    sampler = sampling.sampler(**NEARLY_GREEDY)
    assert lm().generate("Hi", sampler=sampler) == lm().generate("Hi", **NEARLY_GREEDY)


def test_generate_ends_at_the_separator_unless_told_otherwise():
    nothing_else = {"logit_bias": {0: 1e6}, "max_new_tokens": 3}
    assert lm().generate([72], **nothing_else) == []
    assert lm().generate([72], stop_tokens=(), **nothing_else) == [0, 0, 0]
    assert "".join(lm().stream("H", **nothing_else)) == ""
    assert "".join(lm().stream("H", stop_tokens=(), **nothing_else)) == "\0\0\0"


def test_generate_continues_a_context_and_leaves_it():
    loaded, settings = lm(), {"max_new_tokens": 6} | NEARLY_GREEDY
    context = loaded.read("One mor")
    at_once = loaded.generate("One morning, when", **settings)
    for _ in range(2):
        assert loaded.generate("ning, when", context=context, **settings) == at_once
    text, after = loaded.generate("One morning, when", return_context=True, max_new_tokens=3, **NEARLY_GREEDY)
    assert text + loaded.generate("", context=after, max_new_tokens=3, **NEARLY_GREEDY) == at_once


def test_logits_equal_one_full_pass_of_text_and_ids():
    """A list for a list; of an empty text those after the separator; after a context those of what follows it."""
    texts = ["Hi", "One mo", "m"]
    expected, context = whole(*unstacked("rwkv4"), [encoded(text) for text in texts])
    (after_separator, *_), _ = whole(*unstacked("rwkv4"), [[0]])
    for given in (texts[0], encoded(texts[0]), np.array(encoded(texts[0]), np.uint16)):
        found, after = lm().logits(given)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (2, 256)
        assert error_ratio(found, expected[0]) < 1e-5
        assert_near(after, lm().read(given))
    found, after = lm().logits(texts)
    assert isinstance(found, list) and [x.shape for x in found] == [(2, 256), (6, 256), (1, 256)]
    for actual_TV, expected_TV in zip(found, expected, strict=True):
        assert error_ratio(actual_TV, expected_TV) < 1e-5
    assert_near(after, context)
    found, after = lm().logits("")
    assert found.shape == (1, 256) and error_ratio(found, after_separator) < 1e-5
    found, _ = lm().logits(encoded(texts[0]), after)
    assert error_ratio(found, whole(*unstacked("rwkv4"), [[0, *encoded(texts[0])]])[0][0][1:]) < 1e-5
    assert lm().logits("", after)[0].shape == (0, 256)


@KINDS
def test_scores_are_log_likelihoods_whatever_the_batch_and_the_cut(kind, short_segments):
    model = lm(kind)
    ids = encoded(TEXT)
    (logits_TV,), _ = whole(*unstacked(kind), [[0, *ids]])
    logits_TV = np.float64(logits_TV[:-1])
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    expected = log_p_TV[np.arange(len(ids)), ids]
    short, long, empty = model.score([TEXT[:5], TEXT, TEXT[:1]])
    np.testing.assert_allclose(long, expected, atol=2e-4)
    np.testing.assert_allclose(short, expected[:5], atol=2e-4)
    np.testing.assert_allclose(empty, expected[:1], atol=2e-4)
    np.testing.assert_allclose(model.score(TEXT), expected, atol=2e-4)
    np.testing.assert_allclose(model.score(ids[:1]), expected[:1], atol=2e-4)
    context = model.read([0, *ids[:15]])
    np.testing.assert_allclose(model.score(ids[15:], context), expected[15:], atol=2e-4)
    np.testing.assert_allclose(model.score(ids[15:], context), expected[15:], atol=2e-4)  # the context stays


@KINDS
def test_an_embedding_is_the_mean_of_the_inputs_of_the_head(kind, short_segments):
    model, params = unstacked(kind)
    hidden_BTD, _ = jax.jit(lambda ids_BT: model.apply({"params": params}, ids_BT, method="hidden"))(
        np.array([encoded(TEXT)])
    )
    hidden_TD = np.asarray(hidden_BTD[0], np.float64)
    both_BD = lm(kind).embed(["short", TEXT, TEXT[:40]])
    assert error_ratio(both_BD[1], hidden_TD.mean(axis=0)) < 1e-5
    assert error_ratio(both_BD[2], hidden_TD[:40].mean(axis=0)) < 1e-5
    assert error_ratio(lm(kind).embed(TEXT), both_BD[1]) < 1e-5
    assert error_ratio(lm(kind).embed("short"), both_BD[0]) < 1e-5
    after = lm(kind).embed(TEXT[16:], lm(kind).read(TEXT[:16]))
    assert error_ratio(after, hidden_TD[16:].mean(axis=0)) < 1e-5


def test_save_pretrained_survives_the_round_trip(tmp_path):
    lm().save_pretrained(tmp_path / "folder")
    again = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "folder")
    assert again.tokenizer.name == "bytes" and again.model == lm().model
    assert_equal(again.params, lm().params)
    context = lm().read("One morning")
    lm().save_context(tmp_path / "context", context, "One morning")
    found, text = again.load_context(tmp_path / "context")
    assert text == "One morning"
    assert_equal(found, context)


def test_from_pretrained_casts_to_the_dtype_that_is_asked_for(path):
    half = rwkv_jax.RWKVForCausalLM.from_pretrained(path, dtype="bfloat16")
    assert half.params["head"]["kernel"].dtype == "bfloat16" and half.model.dtype == "bfloat16"


@SLOW
def test_half_precision_model_generates_text(path):
    half = rwkv_jax.RWKVForCausalLM.from_pretrained(path, dtype="bfloat16")
    assert isinstance(half.generate("Hi", max_new_tokens=4), str)


def test_without_a_tokenizer_only_ids_are_read_and_written(tmp_path, capsys):
    rwkv_jax.save(tmp_path / "model.pth", *made("rwkv4", scan=False))  # of 11 tokens
    loaded = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "model.pth")
    err = capsys.readouterr().err
    assert err.startswith("no tokenizer, only ids: ") and err.count("\n") == 1
    for use in (loaded.generate, loaded.stream, loaded.read, loaded.logits, loaded.score, loaded.embed):
        with pytest.raises(ValueError, match="loaded without a tokenizer"):
            use("text")
    with pytest.raises(FileNotFoundError):
        rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "model.pth", tokenizer="absent.json")
    ids_only = rwkv_jax.RWKVForCausalLM(*unstacked("rwkv4"))
    assert len(ids_only.generate([1, 2], max_new_tokens=3, stop_tokens=())) == 3
    assert ids_only.score([1, 2, 3]).shape == (3,)
    assert ids_only.read([1, 2]).logits_BV.shape == (1, 256)


def test_pretrained_names_mistakes():
    with pytest.raises(ValueError, match="texts and ids"):
        lm().generate(["text", [1, 2]])
    with pytest.raises(ValueError, match="nothing to score"):
        lm().score(["text", "", "a"])
    with pytest.raises(ValueError, match="nothing to embed"):
        lm().embed("")
    with pytest.raises(ValueError, match="the context holds 1 texts"):
        lm().score(["a", "b"], lm().read("text"))
    with pytest.raises(TypeError, match="do_sample"):
        lm().generate("text", do_sample=True)
