import numpy as np
import pytest
from judge import error_ratio
from small import forward, made

import rwkv_jax
from rwkv_jax import evaluate, tokenizers
from rwkv_jax.generate import sampling

TEXT = "One morning, when Gregor Samsa woke from troubled dreams.\n" * 12  # more than one segment of `score`


def lm(kind="rwkv4", tokenizer="bytes"):
    model, params = made(kind, vocab_size=256, scan=False)
    return rwkv_jax.RWKVForCausalLM(model, params, tokenizer and tokenizers.get_tokenizer(tokenizer))


def expected_nats(lm, ids):
    """From one pass over the separator and all ids."""
    logits_BTV, _ = forward(lm.model, lm.params, np.array([[0, *ids]]))
    logits_TV = np.asarray(logits_BTV[0], np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    return log_p_TV[np.arange(len(ids)), ids]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pth"
    rwkv_jax.save(path, lm().model, lm().params)
    return path


def test_text_gives_text_ids_give_ids_and_a_list_a_list(path):
    loaded = rwkv_jax.RWKVForCausalLM.from_pretrained(path, tokenizer="bytes")
    settings = {"max_new_tokens": 8, "temperature": 0}
    ids = loaded.generate([72, 105], **settings)
    assert len(ids) == 8 and all(isinstance(token, int) for token in ids)
    text = loaded.generate("Hi", **settings)
    assert text == bytes(ids).decode(errors="replace")
    assert loaded.generate(["Hi", "Hi"], **settings) == [text, text]
    assert loaded.generate([[72, 105]], **settings) == [ids]
    assert loaded.generate(np.array([[72, 105]]), **settings) == [ids]
    assert "".join(loaded.stream("Hi", **settings)) == text
    assert loaded.generate(["Hi"], max_new_tokens=[3], temperature=0) == [bytes(ids[:3]).decode(errors="replace")]


def test_a_sampled_text_is_that_of_its_seed():
    drawn = [lm().generate("Hi", seed=seed, max_new_tokens=20, top_p=0.85) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    sampler = sampling.sampler(temperature=0)
    assert lm().generate("Hi", sampler=sampler, max_new_tokens=9) == lm().generate(
        "Hi", temperature=0, max_new_tokens=9
    )


def test_a_draft_changes_the_time_and_not_the_greedy_text():
    plain = lm().generate(["Hi", "Good morning"], temperature=0, max_new_tokens=20)
    drafted = lm().generate(["Hi", "Good morning"], draft=lm("transformer"), temperature=0, max_new_tokens=20)
    assert drafted == plain
    with pytest.raises(ValueError, match="stop strings beside a draft"):
        lm().generate("Hi", draft=lm(), stop="x")


def test_a_document_ends_at_the_separator_unless_told_otherwise():
    nothing_else = {"logit_bias": {0: 1e6}, "max_new_tokens": 3}
    assert lm().generate([72], **nothing_else) == []
    assert lm().generate([72], stop_tokens=(), **nothing_else) == [0, 0, 0]
    assert "".join(lm().stream("H", **nothing_else)) == ""
    assert "".join(lm().stream("H", stop_tokens=(), **nothing_else)) == "\0\0\0"


def test_a_context_is_continued_and_stays(path):
    loaded, settings = lm(), {"temperature": 0, "max_new_tokens": 6}
    context = loaded.read("One morning")
    at_once = loaded.generate("One morning, when", **settings)
    for _ in range(2):
        assert loaded.generate(", when", context=context, **settings) == at_once
    text, after = loaded.generate("One morning, when", return_context=True, temperature=0, max_new_tokens=3)
    assert text + loaded.generate("", context=after, temperature=0, max_new_tokens=3) == at_once


@pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])
def test_scores_are_log_likelihoods_whatever_the_batch_and_the_cut(kind):
    model = lm(kind)
    ids = list(TEXT.encode())
    expected = expected_nats(model, ids)
    assert len(ids) > evaluate.SEGMENT
    np.testing.assert_allclose(model.score(TEXT), expected, atol=2e-4)
    short, long = model.score([TEXT[:5], TEXT])
    np.testing.assert_allclose(long, expected, atol=2e-4)
    np.testing.assert_allclose(short, expected[:5], atol=2e-4)
    np.testing.assert_allclose(model.score(ids[:1]), expected[:1], atol=2e-4)
    context = model.read([0, *ids[:40]])
    np.testing.assert_allclose(model.score(ids[40:], context), expected[40:], atol=2e-4)
    np.testing.assert_allclose(model.score(ids[40:], context), expected[40:], atol=2e-4)  # the context stays


@pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])
def test_an_embedding_is_the_mean_of_what_the_head_sees(kind):
    model = lm(kind)
    ids = np.array([list(TEXT.encode())])
    hidden_BTD, _ = model.model.apply({"params": model.params}, ids, method="hidden")
    expected_D = np.asarray(hidden_BTD[0], np.float64).mean(axis=0)
    assert error_ratio(model.embed(TEXT), expected_D) < 1e-5
    both_BD = model.embed(["short", TEXT])
    assert error_ratio(both_BD[1], expected_D) < 1e-5
    assert error_ratio(both_BD[0], model.embed("short")) < 1e-5
    assert error_ratio(model.embed(TEXT[40:], model.read(TEXT[:40])), both_BD[1]) > 1e-3  # a mean of fewer


def test_what_is_saved_is_what_comes_back(tmp_path):
    lm().save_pretrained(tmp_path / "folder")
    again = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "folder")
    assert again.tokenizer.name == "bytes"
    settings = {"temperature": 0, "max_new_tokens": 12}
    assert again.generate("Hi", **settings) == lm().generate("Hi", **settings)
    lm().save_context(tmp_path / "context", lm().read("One morning"), "One morning")
    context, text = again.load_context(tmp_path / "context")
    assert text == "One morning"
    np.testing.assert_array_equal(context.logits_BV, lm().read("One morning").logits_BV)


def test_half_precision_is_the_dtype_of_loading(path):
    half = rwkv_jax.RWKVForCausalLM.from_pretrained(path, dtype="bfloat16")
    assert half.params["head"]["kernel"].dtype == "bfloat16"
    assert isinstance(half.generate("Hi", max_new_tokens=4), str)


def test_without_a_tokenizer_there_are_ids(tmp_path, capsys):
    model, params = made("rwkv4", scan=False)  # of 11 tokens
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    loaded = rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "model.pth")
    err = capsys.readouterr().err
    assert err.startswith("no tokenizer, only ids: ") and err.count("\n") == 1
    assert len(loaded.generate([1, 2], max_new_tokens=3, stop_tokens=())) == 3
    assert loaded.score([1, 2, 3]).shape == (3,)
    for use in (loaded.generate, loaded.stream, loaded.read, loaded.score, loaded.embed):
        with pytest.raises(ValueError, match="loaded without a tokenizer"):
            use("text")
    with pytest.raises(FileNotFoundError):
        rwkv_jax.RWKVForCausalLM.from_pretrained(tmp_path / "model.pth", tokenizer="absent.json")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="texts and ids"):
        lm().generate(["text", [1, 2]])
    with pytest.raises(ValueError, match="nothing to score"):
        lm().score(["text", ""])
    with pytest.raises(ValueError, match="nothing to embed"):
        lm().embed("")
    with pytest.raises(ValueError, match="the context holds 1 texts"):
        lm().score(["a", "b"], lm().read("text"))
    with pytest.raises(TypeError, match="do_sample"):
        lm().generate("text", do_sample=True)
