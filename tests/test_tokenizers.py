import numpy as np
import pytest
import tokenizers

from rwkv_jax.tokenizers import TextStream, get_tokenizer

TEXT = "Ein Käfer sang: 日本語, naïve 😀 family 👩‍👩‍👧, Ελληνικά.\n\n  indented   \t x\n\nreturn value\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT] * 4, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    library.save(str(path))
    return get_tokenizer(str(path))


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return get_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("bpe")


def test_byte_ids_are_the_utf8_bytes():
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.encode("Aé") == [0x41, 0xC3, 0xA9]
    assert (tokenizer.name, tokenizer.vocab_size) == ("bytes", 256)
    assert tokenizer.decode([0x41, 0xC3]) == "A\ufffd"


def test_decode_inverts_encode(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(np.array(tokenizer.encode(TEXT), np.uint16)) == TEXT
    assert tokenizer.decode([]) == ""


def test_special_tokens_are_text(bpe):
    assert bpe.encode("a<|endoftext|>") == [*bpe.encode("a"), 0]
    assert bpe.decode([0]) == "<|endoftext|>"


def test_vocab_size_bounds_every_id_where_ids_have_gaps(bpe, tmp_path):
    text = bpe.library.to_str().replace('"B":34', '"B":5000')
    (tmp_path / "gaps.json").write_text(text)
    gaps = get_tokenizer(str(tmp_path / "gaps.json"))
    assert max(gaps.encode("ABC")) == 5000 == gaps.vocab_size - 1


@pytest.mark.parametrize("block_bytes", [13, 997, 1 << 20])
def test_blocks_give_the_tokens_of_the_whole(tokenizer, block_bytes):
    rng = np.random.default_rng(0)
    parts = [*TEXT.split(" "), "\n", "\n\n", "\n\n\n", "  ", "\t", "...\n"]
    texts = [" ".join(rng.choice(parts, size)).encode() for size in (30_000, 3, 20_000)]
    blocks = [[text[i : i + block_bytes] for i in range(0, len(text), block_bytes)] for text in texts]
    tokens = [[] for _ in texts]
    for index, ids in tokenizer.encode_documents(blocks):
        tokens[index].append(ids)
    for text, ids in zip(texts, tokens, strict=True):
        assert np.concatenate(ids).tolist() == tokenizer.encode(text.decode())
    if tokenizer.name != "bytes":
        assert len(tokens[0]) > 1, "long enough to be cut"


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_texts_stay_whole_for_a_tokenizer_that_marks_their_beginning(scheme, tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, show_progress=False)
    library.train_from_iterator(["some words\nalpha beta\n"] * 4, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = get_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "alpha beta\n" * 20_000
    ids = [ids for _, ids in tokenizer.encode_documents([[text.encode()]])]
    assert np.concatenate(ids).tolist() == tokenizer.encode(text)


def test_a_line_that_begins_with_a_wide_space_keeps_its_line_break(tmp_path):
    """Chinese text is indented by U+3000, which GPT-2's pre-tokenizer joins to the line break before it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    line = "word.\n\u3000word.\n"
    library.train_from_iterator([line] * 50, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = get_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = [ids for _, ids in tokenizer.encode_documents([[(line * 10_000).encode()]])]
    assert len(ids) > 1 and np.concatenate(ids).tolist() == tokenizer.encode(line * 10_000)


def test_blocks_that_are_not_utf8(bpe):
    with pytest.raises(UnicodeDecodeError):
        list(bpe.encode_documents([[b"abc\xff"]]))
    [(index, ids)] = get_tokenizer("bytes").encode_documents([[b"abc\xff\x00"]])
    assert (index, ids.tolist()) == (0, [97, 98, 99, 255, 0])


def test_stream_of_text_never_shows_a_broken_character(tokenizer):
    stream, ids = TextStream(tokenizer), tokenizer.encode(TEXT)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == TEXT
    assert stream.flush() == ""
    assert all("\ufffd" not in piece for piece in pieces)
    # Text comes as soon as it can: a piece is empty only inside a character.
    for n, piece in enumerate(pieces, start=1):
        assert piece or tokenizer.decode(ids[:n]).endswith("\ufffd")


def test_stream_of_any_tokens_equals_decode(tokenizer):
    rng = np.random.default_rng(0)
    single_bytes = np.array([tokenizer.encode("é")[0], *range(128, 256)])
    for draw in range(200):
        vocabulary = single_bytes if draw % 2 else np.arange(tokenizer.vocab_size)
        ids = rng.choice(vocabulary, rng.integers(1, 60))
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_of_a_sentencepiece_model_keeps_spaces_and_characters(tmp_path):
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    steps = tokenizers.decoders
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    library.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = get_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "a b 日本人😀😀 c" * 5
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_flush_gives_the_rest_and_starts_anew():
    stream = TextStream(get_tokenizer("bytes"))
    assert [stream.push(token) for token in b"a\xf0\x9f\x98"] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(token) for token in "é".encode()] == ["", "é"]
    assert stream.flush() == ""


def test_stream_decodes_a_bounded_number_of_tokens():
    class Bounded:
        def decode(self, ids):
            assert len(ids) <= 17
            return bytes(ids).decode(errors="replace")

    garbage, smile = b"\x80" * 20, "😀".encode()
    for ids in (
        garbage * 5,
        b"a" * 100,
        (garbage + b"a" + garbage[:7]) * 4,
        (garbage + smile) * 2,
        garbage[:5] + smile,
    ):
        stream = TextStream(Bounded())
        assert "".join(map(stream.push, ids)) + stream.flush() == ids.decode(errors="replace")


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer file nowhere\.json: expected 'bytes', 'world' or"):
        get_tokenizer("nowhere.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is not a file that the tokenizers library reads: ") as e:
        get_tokenizer(str(tmp_path / "broken.json"))
    assert "\n" not in str(e.value)
