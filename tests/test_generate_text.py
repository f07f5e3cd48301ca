"""Streams, batches of texts and stop strings."""

import functools
import itertools

import pytest
from generating import KINDS, cycling, unstacked
from hypothesis import given
from hypothesis import strategies as st
from judge import error_ratio

from rwkv_jax.generate import DISPATCH, generate, generate_texts, read, rows, stream
from rwkv_jax.generate import text as text_module
from rwkv_jax.generate.text import StoppedText
from rwkv_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
GREEDY = {"temperature": 0}
decoded = lambda tokens: bytes(tokens).decode(errors="replace")


def assert_read(kind, context, *texts):
    """The context is that of these ids."""
    for b, text in enumerate(texts):
        alone = read(*unstacked(kind), text)
        assert error_ratio(rows(context, b).logits_BV, alone.logits_BV) < 1e-5
        follows = [read(*unstacked(kind), [3, 4, 5], c).logits_BV for c in (rows(context, b), alone)]
        assert error_ratio(*follows) < 1e-5


# -------------------------------------------------------------------------------------------------- streams


@KINDS
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_stream_is_the_text_of_generate(kind, top_p):
    settings = {"max_new_tokens": 60, "temperature": 1.3, "top_p": top_p, "seed": 5}
    tokens = generate(*unstacked(kind), list("日本".encode()), **settings)
    streamed = stream(*unstacked(kind), "日本", BYTES, **settings)
    pieces = list(streamed)
    assert "".join(pieces) == decoded(tokens) == streamed.text and streamed.tokens == tokens
    assert all(pieces) and len(pieces) > 10


def test_stream_never_breaks_a_character():
    text = "é日😀."
    continued = functools.partial(stream, *cycling(text), "x.", BYTES, **GREEDY)
    assert list(continued(max_new_tokens=20)) == list(text) * 2
    assert list(continued(max_new_tokens=8)) == ["é", "日", "\ufffd"]  # three bytes of four


def test_stream_computes_nothing_ahead():
    pieces = stream(*unstacked("rwkv4"), "abc", BYTES, max_new_tokens=2**32 - 1)
    first = list(itertools.islice(pieces, 5))
    assert first == list(itertools.islice(stream(*unstacked("rwkv4"), "abc", BYTES), 5))


@KINDS
@pytest.mark.parametrize("num_pieces", [0, 3, 1000])
def test_a_stream_left_alone_is_valid(kind, num_pieces):
    prompt, settings = "日本", {"seed": 5, "temperature": 1.3}
    whole = generate(*unstacked(kind), list(prompt.encode()), max_new_tokens=60, **settings)
    streamed = stream(*unstacked(kind), prompt, BYTES, max_new_tokens=40, **settings)
    context = streamed.context
    assert_read(kind, context, list(prompt.encode()))
    pieces = list(itertools.islice(streamed, num_pieces))
    tokens, context = streamed.tokens, streamed.context
    assert streamed.text == "".join(pieces) and decoded(tokens).startswith(streamed.text)
    assert len(decoded(tokens)) - len(streamed.text) <= 3  # of an incomplete character
    assert_read(kind, context, list(prompt.encode()) + tokens)
    rest = {"max_new_tokens": 60 - len(tokens), "start": len(tokens)} | settings
    assert tokens + generate(*unstacked(kind), [], context=context, **rest) == whole
    if num_pieces < 1000:  # and the stream goes on, whatever was made of its context
        list(streamed)
        assert streamed.tokens == whole[:40]
        assert_read(kind, context, list(prompt.encode()) + tokens)


def test_a_stream_survives_an_interruption(monkeypatch):
    """The arrays of a step are lost when it is interrupted, and read again."""
    streamed = stream(*unstacked("rwkv4"), "", BYTES, max_new_tokens=40)
    list(itertools.islice(streamed, 5))
    before = streamed.tokens

    def interrupted(*args):
        advance(*args)
        raise KeyboardInterrupt

    advance = text_module.advance
    monkeypatch.setattr(text_module, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(streamed)
    assert streamed.tokens == before and list(streamed) == []
    assert_read("rwkv4", streamed.context, [0, *before])


def test_a_text_goes_on_from_a_context():
    context = read(*unstacked("rwkv4"), list(b"Once upon"))
    for prompt in ("", " a time"):
        settings = {"max_new_tokens": 30, **GREEDY}
        expected = list(stream(*unstacked("rwkv4"), "Once upon" + prompt, BYTES, **settings))
        assert list(stream(*unstacked("rwkv4"), prompt, BYTES, context=context, **settings)) == expected


# -------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("max_new_tokens", [2 * DISPATCH, 7])
@pytest.mark.parametrize("stop", ["k.", ["zz", "fghi", "z"], "fgz", ".abcdefghijk.a", "k.abcdefghijk.abcdefghijk.ab"])
def test_a_stop_string_ends_a_stream(stop, max_new_tokens):
    cycle = "abcdefghijk."
    whole = (cycle * 10)[:max_new_tokens]
    strings = [stop] if isinstance(stop, str) else stop
    expected = whole[: min([whole.find(s) for s in strings if s in whole], default=None)]
    streamed = stream(*cycling(cycle), ".", BYTES, max_new_tokens=max_new_tokens, stop=stop, **GREEDY)
    assert "".join(streamed) == streamed.text == decoded(streamed.tokens) == expected
    result = generate_texts(*cycling(cycle), ["."], BYTES, max_new_tokens=max_new_tokens, stop=stop, **GREEDY)
    assert result.texts == [expected] and result.tokens == [streamed.tokens]


def test_what_may_be_a_stop_string_is_held_back():
    streamed = stream(*cycling("abcdefg."), ".", BYTES, max_new_tokens=12, stop=["cde!", "g.x"], **GREEDY)
    assert list(streamed) == ["a", "b", "cdef", "g.a", "b", "cd"]
    streamed = stream(*cycling("abcdefg."), ".", BYTES, max_new_tokens=12, stop=["cde!"], **GREEDY)
    list(itertools.islice(streamed, 2))
    assert streamed.text == "ab" == decoded(streamed.tokens)


@pytest.mark.parametrize(
    "kind", ["rwkv4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hybrid", "transformer"))]
)
def test_the_context_has_read_no_stop_string(kind):
    """Rows stop in different dispatches, at the beginning, across the end of a dispatch, and not at all."""
    prompts = ["ab", "x" * 300, "日本", "q", "m"]
    settings = {"max_new_tokens": 3 * DISPATCH, "seed": 4, "temperature": 2.0}
    plain = generate_texts(*unstacked(kind), prompts, BYTES, **settings)
    start = [5, DISPATCH - 3, 0, 2 * DISPATCH - 1]
    texts = [decoded(row) for row in plain.tokens]
    ends = [decoded(row[:n]) for row, n in zip(plain.tokens, start, strict=False)]
    stop = [[text[len(end) : len(end) + 6]] for text, end in zip(texts, ends, strict=False)] + [[]]
    result = generate_texts(*unstacked(kind), prompts, BYTES, stop=stop, **settings)
    for b, (text, strings) in enumerate(zip(texts, stop, strict=True)):
        assert result.texts[b] == (text[: text.index(strings[0])] if strings else text)
        assert decoded(result.tokens[b]) == result.texts[b]
    assert result.tokens[4] == plain.tokens[4]
    read_by_rows = [list(p.encode()) + tokens for p, tokens in zip(prompts, result.tokens, strict=True)]
    assert_read(kind, result.context, *read_by_rows)
    streamed = stream(*unstacked(kind), prompts[0], BYTES, stop=stop[0], **settings)
    assert "".join(streamed) == result.texts[0]
    assert_read(kind, streamed.context, read_by_rows[0])


class Words:
    """A tokenizer with tokens of several characters, and one for each letter."""

    words = ("ab", "c.", "x", "\n\n", "de\n", "\n", *"abcde.")

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)

    def encode(self, text):
        tokens = []
        while text:
            tokens.append(max((w for w in self.words if text.startswith(w)), key=len))
            text = text[len(tokens[-1]) :]
        return [self.words.index(word) for word in tokens]


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.text("abc.x\nde", min_size=1, max_size=4), max_size=3))
def test_texts_up_to_a_stop_string(tokens, stop):
    """The result ends where the first string that is complete begins, wherever the tokens end."""
    row, shown, settled = StoppedText(Words(), stop), "", []
    for count, token in enumerate(tokens, 1):
        shown += row.push(token)
        assert Words().decode(row.tokens).startswith(shown)
        if row.stopped:
            break
        settled.append(row.settled)
        assert not any(string in Words().decode(tokens[:count]) for string in stop)
    else:
        shown += row.flush()
    if row.stopped:
        text = Words().decode(tokens[:count])
        assert shown == text[: min(text.find(string) for string in stop if string in text)]
        assert row.tokens[: max(settled, default=0)] == tokens[: max(settled, default=0)]
    assert Words().decode(row.tokens) == shown


@KINDS
def test_a_batch_of_texts_is_its_single_runs(kind):
    prompts, seeds, limits = ["ab", "", "日本"], [1, 2, 3], [70, 5, 33]
    result = generate_texts(*unstacked(kind), prompts, BYTES, seed=seeds, max_new_tokens=limits, stop=["\x07"])
    for b, (prompt, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True)):
        one = stream(*unstacked(kind), prompt, BYTES, seed=seed, max_new_tokens=limit, stop=["\x07"])
        assert "".join(one) == result.texts[b] and one.tokens == result.tokens[b]
    of_ids = generate_texts(*unstacked(kind), [list(b"ab")], BYTES, seed=1, max_new_tokens=70, stop="\x07")
    assert of_ids.texts == result.texts[:1]


def test_mistakes_are_named_when_asked_not_when_read():
    for change, message in (
        ({"stop": [""]}, "stop is"),
        ({"stop": [["a"], ["b"]]}, "for each of 1"),
        ({"stop": [3]}, "stop is"),
        ({"stop": 3}, "stop is"),
        ({"prompts": []}, "expected a list of texts"),
        ({"prompts": "abc"}, "expected a list of texts"),
        ({"prompts": [[256]]}, "holds token 256"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_texts(*unstacked("rwkv4"), **{"prompts": ["a"], "tokenizer": BYTES} | change)


@pytest.mark.slow
def test_text_of_any_length_costs_the_same_a_token():
    """A million characters with a stop string that is never complete: nothing is looked at twice."""
    row = StoppedText(BYTES, ["ab!", "b\n"])
    text = "".join(row.push(token) for token in itertools.islice(itertools.cycle(b"xabyb"), 1_000_000))
    assert len(text) > 999_990
