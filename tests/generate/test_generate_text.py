"""Streams, batches of texts and stop strings."""

import functools
import itertools

import pytest
from generating import KINDS, NEARLY_GREEDY, B, assert_read, cycling, unstacked
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.generate import DISPATCH, generate, generate_texts, read, stream
from rwkv_jax.generate import text as text_module
from rwkv_jax.generate.text import StoppedText

BYTES = ByteTokenizer()
PROMPT = "日本"
decoded = lambda tokens: bytes(tokens).decode(errors="replace")
encoded = lambda text: list(text.encode())


def assert_context_of(kind, context, text, tokens):
    """The context is that of the prompt and these tokens, also as what is read after it shows."""
    assert_read(kind, context, encoded(text) + tokens)
    assert_read(kind, read(*unstacked(kind), [3, 4, 5], context), [*encoded(text), *tokens, 3, 4, 5])


# -------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("top_p", [1.0, pytest.param(0.8, marks=pytest.mark.slow)])
@KINDS
def test_stream_yields_the_text_of_generate(kind, top_p):
    settings = {"max_new_tokens": 60, "temperature": 1.3, "top_p": top_p, "seed": 5}
    tokens = generate(*unstacked(kind), encoded(PROMPT), **settings)
    streamed = stream(*unstacked(kind), PROMPT, BYTES, **settings)
    pieces = list(streamed)
    assert "".join(pieces) == decoded(tokens) == streamed.text and streamed.tokens == tokens
    assert all(pieces) and len(pieces) > 10


def test_stream_never_breaks_a_character():
    text = "é日😀."
    continued = functools.partial(stream, *cycling(text), "x.", BYTES, **NEARLY_GREEDY)
    assert list(continued(max_new_tokens=20)) == list(text) * 2
    assert list(continued(max_new_tokens=8)) == ["é", "日", "\ufffd"]  # three bytes of four


def test_stream_computes_nothing_ahead():
    pieces = stream(*unstacked("rwkv4"), "abc", BYTES, max_new_tokens=2**32 - 1)
    first = list(itertools.islice(pieces, 5))
    assert first == list(itertools.islice(stream(*unstacked("rwkv4"), "abc", BYTES), 5))


@KINDS
def test_stream_stays_valid_when_abandoned(kind):
    """Its context is that of what was yielded, and can be continued; so can the stream."""
    settings = {"seed": 5, "temperature": 1.3}
    whole = generate(*unstacked(kind), encoded(PROMPT), max_new_tokens=60, **settings)
    streamed = stream(*unstacked(kind), PROMPT, BYTES, max_new_tokens=40, **settings)
    taken = [([], streamed.context)]
    for num_pieces in (0, 3, 1000):
        list(itertools.islice(streamed, num_pieces))
        tokens, context = streamed.tokens, streamed.context
        taken.append((tokens, context))
        assert decoded(tokens).startswith(streamed.text)
        assert len(decoded(tokens)) - len(streamed.text) <= 3  # of an incomplete character
        rest = {"max_new_tokens": 60 - len(tokens), "start": len(tokens)} | settings
        assert tokens + generate(*unstacked(kind), [], context=context, **rest) == whole
    assert streamed.tokens == whole[:40]
    for tokens, context in taken:  # also those from which the stream has gone on
        assert_context_of(kind, context, PROMPT, tokens)


def test_stream_survives_an_interruption(monkeypatch):
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


def test_stream_continues_a_context():
    context = read(*unstacked("rwkv4"), encoded("Once upon"))
    for prompt in ("", " a time"):
        settings = {"max_new_tokens": 30} | NEARLY_GREEDY
        expected = list(stream(*unstacked("rwkv4"), "Once upon" + prompt, BYTES, **settings))
        assert list(stream(*unstacked("rwkv4"), prompt, BYTES, context=context, **settings)) == expected


# -------------------------------------------------------------------------------------------------- stop strings


def test_stop_strings_end_texts():
    """Within one dispatch, across several, across tokens, after many of them, and not at all. A row may stop while
    others continue."""
    cycle, model = "abcdefghijk.", cycling("abcdefghijk.")
    stops = ("k.", ["zz", "fghi", "z"], "fgz", ".abcdefghijk.a", "k.abcdefghijk.abcdefghijk.ab")
    for limit in (2 * DISPATCH, 7):
        whole = (cycle * 10)[:limit]
        strings = [[stop] if isinstance(stop, str) else stop for stop in stops]
        expected = [whole[: min([whole.find(s) for s in row if s in whole], default=None)] for row in strings]
        settings = {"max_new_tokens": limit} | NEARLY_GREEDY
        for rows in ([0, 1, 2], [3, 4, 2]):
            result = generate_texts(*model, ["."] * B, BYTES, stop=[strings[i] for i in rows], **settings)
            assert result.texts == [expected[i] for i in rows]
            assert result.tokens == [encoded(text) for text in result.texts]
        for stop, text in zip(stops, expected, strict=True):
            streamed = stream(*model, ".", BYTES, stop=stop, **settings)
            assert "".join(streamed) == streamed.text == decoded(streamed.tokens) == text


def test_generate_texts_draws_nothing_once_every_row_has_stopped(monkeypatch):
    calls, advance = [], text_module.advance
    monkeypatch.setattr(text_module, "advance", lambda *args: calls.append(args) or advance(*args))
    settings = {"stop": ["k."], "max_new_tokens": 3 * DISPATCH} | NEARLY_GREEDY
    result = generate_texts(*cycling("abcdefghijk."), ["."] * B, BYTES, **settings)
    assert result.texts == ["abcdefghij"] * B and len(calls) == 1


def test_stream_holds_back_what_may_begin_a_stop_string():
    model, settings = cycling("abcdefg."), {"max_new_tokens": 12} | NEARLY_GREEDY
    streamed = stream(*model, ".", BYTES, stop=["cde!", "g.x"], **settings)
    assert list(streamed) == ["a", "b", "cdef", "g.a", "b", "cd"]
    streamed = stream(*model, ".", BYTES, stop=["cde!"], **settings)
    list(itertools.islice(streamed, 2))
    assert streamed.text == "ab" == decoded(streamed.tokens)


@KINDS
def test_context_has_not_read_the_stop_string(kind):
    """Rows stop in different dispatches, at the beginning, across the end of a dispatch, and not at all."""
    prompts = ["ab", "x" * 258, "m"]
    settings = {"max_new_tokens": 3 * DISPATCH, "seed": 4, "temperature": 2.0}
    plain = generate_texts(*unstacked(kind), prompts, BYTES, **settings)
    texts = [decoded(row) for row in plain.tokens]
    assert plain.texts == texts
    for starts in ((5, DISPATCH - 3, None), (0, 2 * DISPATCH - 1, 2 * DISPATCH + 9)):
        stop = [[]] * B
        for b, start in enumerate(starts):
            if start is not None:
                end = len(decoded(plain.tokens[b][:start]))
                stop[b] = [texts[b][end : end + 6]]
        result = generate_texts(*unstacked(kind), prompts, BYTES, stop=stop, **settings)
        for text, strings, actual, tokens in zip(texts, stop, result.texts, result.tokens, strict=True):
            assert decoded(tokens) == actual == (text[: text.index(strings[0])] if strings else text)
        assert all(result.tokens[b] == plain.tokens[b] for b in range(B) if not stop[b])
        read_by_rows = [encoded(p) + tokens for p, tokens in zip(prompts, result.tokens, strict=True)]
        assert_read(kind, result.context, *read_by_rows)
        after = read(*unstacked(kind), [[3, 4, 5]] * B, result.context)
        assert_read(kind, after, *([*row, 3, 4, 5] for row in read_by_rows))
        streamed = stream(*unstacked(kind), prompts[0], BYTES, stop=stop[0], **settings)
        assert "".join(streamed) == result.texts[0]
        assert_context_of(kind, streamed.context, prompts[0], result.tokens[0])


class Words:
    """A tokenizer with tokens of several characters, which it decodes, and one for each letter, which it encodes."""

    words = ("ab", "c.", "x", "\n\n", "de\n", "\n", *"abcde.")

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)

    def encode(self, text):
        return [self.words.index(letter) for letter in text]


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.text("abc.x\nde", min_size=1, max_size=4), max_size=3))
def test_stopped_text_ends_where_the_first_stop_string_begins(tokens, stop):
    """Of the strings the first that is complete, wherever the tokens end."""
    row, shown = StoppedText(Words(), stop), ""
    for count, token in enumerate(tokens, 1):
        shown += row.push(token)
        assert Words().decode(row.tokens).startswith(shown)
        if row.stopped:
            break
        assert not any(string in Words().decode(tokens[:count]) for string in stop)
    else:
        shown += row.flush()
    if row.stopped:
        text = Words().decode(tokens[:count])
        assert shown == text[: min(text.find(string) for string in stop if string in text)]
        whole = [n for n in range(count) if shown.startswith(Words().decode(tokens[:n]))]
        assert row.tokens[: whole[-1]] == tokens[: whole[-1]]
    assert Words().decode(row.tokens) == shown


@KINDS
def test_generate_texts_of_a_batch_equals_single_streams(kind):
    prompts, seeds, limits = ["ab", "", PROMPT], [1, 2, 3], [70, 5, 33]
    result = generate_texts(*unstacked(kind), prompts, BYTES, seed=seeds, max_new_tokens=limits, stop=["\x07"])
    for b, (prompt, seed, limit) in enumerate(zip(prompts, seeds, limits, strict=True)):
        one = stream(*unstacked(kind), prompt, BYTES, seed=seed, max_new_tokens=limit, stop=["\x07"])
        assert "".join(one) == result.texts[b] and one.tokens == result.tokens[b]
    of_ids = generate_texts(*unstacked(kind), [encoded("ab")], BYTES, seed=1, max_new_tokens=70, stop="\x07")
    assert of_ids.texts == result.texts[:1]


def test_generate_texts_names_mistakes_before_it_computes():
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
def test_stopped_text_takes_the_same_time_for_each_token():
    """A million characters with a stop string that is never complete: nothing is looked at twice."""
    row = StoppedText(BYTES, ["ab!", "b\n"])
    text = "".join(row.push(token) for token in itertools.islice(itertools.cycle(b"xabyb"), 1_000_000))
    assert len(text) > 999_990
