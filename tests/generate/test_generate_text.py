"""Streams, batches of texts and stop strings."""

import functools
import itertools

import pytest
import tokenizers
from generating import KINDS, NEARLY_GREEDY, B, assert_read, cycling, unstacked
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.data.tokenizers import ByteTokenizer, get_tokenizer
from rwkv_jax.generate import DISPATCH, generate, generate_texts, read, stream
from rwkv_jax.generate import text as text_module
from rwkv_jax.generate.text import StoppedText

BYTES = ByteTokenizer()
PROMPT = "日本"
SONG = "the other brother sang another song, and the sister rather gathered the others' leather. " * 2
decoded = lambda tokens: bytes(tokens).decode(errors="replace")
encoded = lambda text: list(text.encode())


@KINDS
def test_stream_yields_the_text_of_generate_and_resumes_after_a_break(kind):
    """The context is that of the yielded text, and continues; so does the stream."""
    settings = {"seed": 5, "temperature": 1.3}
    whole = generate(*unstacked(kind), encoded(PROMPT), max_new_tokens=60, **settings)
    streamed = stream(*unstacked(kind), PROMPT, BYTES, max_new_tokens=40, **settings)
    pieces, taken = [], [([], streamed.context)]
    for num_pieces in (0, 3, 1000):
        pieces += itertools.islice(streamed, num_pieces)
        tokens, context = streamed.tokens, streamed.context
        taken.append((tokens, context))
        assert decoded(tokens).startswith(streamed.text) and "".join(pieces) == streamed.text
        assert len(decoded(tokens)) - len(streamed.text) <= 3  # bytes of an incomplete character
        rest = {"max_new_tokens": 60 - len(tokens), "start": len(tokens)} | settings
        assert tokens + generate(*unstacked(kind), [], context=context, **rest) == whole
    assert streamed.tokens == whole[:40] and streamed.text == decoded(whole[:40])
    assert all(pieces) and len(pieces) > 10
    for tokens, context in taken:  # includes contexts that the stream has continued from
        assert_read(kind, context, encoded(PROMPT) + tokens)


def test_stream_yields_whole_characters():
    text = "é日😀."
    continued = functools.partial(stream, *cycling(text), "x.", BYTES, **NEARLY_GREEDY)
    assert list(continued(max_new_tokens=20)) == list(text) * 2
    assert list(continued(max_new_tokens=8)) == ["é", "日", "\ufffd"]  # three bytes of four


def test_stream_of_a_huge_limit_yields_at_once():
    pieces = stream(*unstacked("rwkv4"), "abc", BYTES, max_new_tokens=2**32 - 1)
    first = list(itertools.islice(pieces, 5))
    assert first == list(itertools.islice(stream(*unstacked("rwkv4"), "abc", BYTES), 5))


def test_stream_context_survives_an_interrupt(monkeypatch):
    """The arrays of an interrupted step are lost; the context is read again from the tokens."""
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


# -------------------------------------------------------------------------------------------------- stop strings


def test_generate_texts_ends_each_text_at_its_stop_string(monkeypatch):
    """The string is complete within one dispatch, across several, across tokens, after many of them, or never. Rows
    stop at different places; once all have stopped no more tokens are drawn."""
    cycle, model, calls, advance = "abcdefghijk.", cycling("abcdefghijk."), [], text_module.advance
    monkeypatch.setattr(text_module, "advance", lambda *args: calls.append(args) or advance(*args))
    for limit in (2 * DISPATCH, 7):
        for stop in ("k.", ["zz", "fghi", "z"], "fgz", ".abcdefghijk.a", "k.abcdefghijk.abcdefghijk.ab", ("hij", "j")):
            strings, settings = [stop] if isinstance(stop, str) else stop, {"max_new_tokens": limit} | NEARLY_GREEDY
            wholes = [(cycle * 10)[start:][:limit] for start in (0, 3, 8)]
            expected = [whole[: min([whole.find(s) for s in strings if s in whole], default=None)] for whole in wholes]
            result = generate_texts(*model, [".", "c", "h"], BYTES, stop=stop, **settings)
            assert len(calls) == 1 or stop != "k."
            assert result.texts == expected and result.tokens == [encoded(text) for text in expected]
            streamed = stream(*model, ".", BYTES, stop=stop, **settings)
            assert "".join(streamed) == streamed.text == decoded(streamed.tokens) == expected[0]
            calls.clear()


def test_stream_holds_back_a_possible_beginning_of_a_stop_string():
    streamed = stream(*cycling("abcdefg."), ".", BYTES, stop=["cde!", "g.x"], max_new_tokens=12, **NEARLY_GREEDY)
    assert list(itertools.islice(streamed, 2)) == ["a", "b"] and decoded(streamed.tokens) == "ab"
    assert list(streamed) == ["cdef", "g.a", "b", "cd"]


@KINDS
def test_generate_texts_context_has_not_read_the_stop_string(kind):
    """Two rows stop in different dispatches, one of them across the end of a dispatch; the third never stops."""
    prompts = ["ab", "x" * 258, "m"]
    settings = {"max_new_tokens": 3 * DISPATCH, "seed": 4, "temperature": 2.0}
    plain = generate_texts(*unstacked(kind), prompts, BYTES, **settings)
    assert plain.texts == [decoded(row) for row in plain.tokens]
    ends = [len(decoded(row[:start])) for row, start in zip(plain.tokens, (5, DISPATCH - 3), strict=False)]
    stop = [text[end : end + 6] for text, end in zip(plain.texts, ends, strict=False)]
    result = generate_texts(*unstacked(kind), prompts, BYTES, stop=stop, **settings)
    for text, actual, tokens, end in zip(plain.texts, result.texts, result.tokens, [*ends, None], strict=True):
        assert decoded(tokens) == actual == text[:end]
    assert result.tokens[2] == plain.tokens[2]
    texts = [encoded(prompt) + tokens for prompt, tokens in zip(prompts, result.tokens, strict=True)]
    assert_read(kind, result.context, *texts)
    after = read(*unstacked(kind), [[3, 4, 5]] * B, result.context)
    assert_read(kind, after, *([*row, 3, 4, 5] for row in texts))


class Words:
    """A tokenizer that decodes tokens of several characters, and encodes each letter as a token."""

    words = ("ab", "c.", "x", "\n\n", "de\n", "\n", *"abcde.")

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)

    def encode(self, text):
        return [self.words.index(letter) for letter in text]


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.text("abc.x\nde", min_size=1, max_size=4), max_size=3))
def test_stopped_text_ends_where_the_first_stop_string_begins(tokens, stop):
    """The first string to be complete counts, at any borders of tokens."""
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


def sentencepiece(path, prepends):
    """A tokenizer like Llama's: ▁ for spaces. Encoding adds one before every text, and decoding drops it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    if prepends:
        parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        library.normalizer = tokenizers.normalizers.Sequence(parts)
    else:
        library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    library.train_from_iterator(SONG.split(), trainer)
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    library.save(str(path))
    return get_tokenizer(str(path))


@pytest.mark.parametrize("prepends", [True, False])
def test_stopped_text_of_a_sentencepiece_tokenizer_equals_the_drawn_text(prepends, tmp_path):
    """Holds for the text alone and after a prompt, for any start and stop."""
    tokenizer = sentencepiece(tmp_path / "tokenizer.json", prepends)
    decode, prompt, song, within = tokenizer.decode, tokenizer.encode("so"), tokenizer.encode(SONG), 0
    after = lambda tokens: decode(prompt + tokens)[len(decode(prompt)) :]
    for first, place in itertools.product(range(30), range(12)):
        drawn = song[first : first + 20]
        stop = decode(drawn)[place : place + 4]
        row = StoppedText(tokenizer, [stop])
        shown = row.extend(drawn, is_end=True)
        assert row.stopped and shown == decode(row.tokens) == decode(drawn)[: decode(drawn).find(stop)]
        assert after(drawn).startswith(after(row.tokens)) and after(row.tokens).lstrip() == shown.lstrip()
        within += row.tokens != drawn[: len(row.tokens)]
    assert within > 50


@pytest.mark.slow
def test_stopped_text_takes_constant_time_per_token():
    """Pushes a million characters with a stop string that is never complete; no character is searched twice."""
    row = StoppedText(BYTES, ["ab!", "b\n"])
    text = "".join(row.push(token) for token in itertools.islice(itertools.cycle(b"xabyb"), 1_000_000))
    assert len(text) > 999_990


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
    model, params = unstacked("rwkv4")
    small, large = model.clone(vocab_size=100), model.clone(vocab_size=300)
    for change, message in (
        ({"stop": ["a", ""]}, r"stop is \['a', ''\], expected one or several strings"),
        ({"stop": 3}, "stop is 3"),
        ({"prompts": []}, "expected a list of texts"),
        ({"prompts": "abc"}, "expected a list of texts"),
        ({"prompts": [[256]]}, "holds token 256"),
        ({"top_p": 0}, "top_p is 0"),
        ({"model": small}, "tokenizer bytes has 256 tokens, the model 100"),
        ({"model": large}, "tokenizer bytes has 256 tokens, the model 300"),
    ):
        arguments = {"model": model, "prompts": ["a"], "tokenizer": BYTES} | change
        with pytest.raises(ValueError, match=message):
            generate_texts(params=params, **arguments)
