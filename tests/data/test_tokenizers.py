"""Tokenizers: text to ids and back, long texts in pieces, streams of text, and damaged files."""

import dataclasses
import json
import os
import string

import numpy as np
import pytest
import tokenizers
from texts import byte_level

from rwkv_jax.data import tokenizers as data_tokenizers
from rwkv_jax.data.tokenizers import TextStream, characters, get_tokenizer, pieces, save

TEXT = "Ein Käfer sang: 日本語, naïve 😀 family 👩‍👩‍👧, Ελληνικά.\n\n  indented   \t x\n\nreturn value\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return get_tokenizer(byte_level(tmp_path_factory.mktemp("bpe") / "tokenizer.json", TEXT, vocab_size=320))


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters")
    return get_tokenizer(str(folder / save(characters([TEXT]), folder)))


@pytest.fixture(scope="module", params=["bytes", "bpe", "chars", "world"])
def tokenizer(request):
    return get_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue(request.param)


def test_tokenizer_decode_inverts_encode(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(np.array(tokenizer.encode(TEXT), np.uint16)) == TEXT
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\ud800")


def test_byte_tokenizer_encodes_blocks_that_are_not_utf8(bpe):
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.encode("Aé")) == ("bytes", 256, [0x41, 0xC3, 0xA9])
    assert tokenizer.decode([0x41, 0xC3]) == "A\ufffd"
    [(index, ids)] = tokenizer.encode_documents([[b"abc\xff\x00"]])
    assert (index, ids.tolist()) == (0, [97, 98, 99, 255, 0])
    with pytest.raises(UnicodeDecodeError):
        list(bpe.encode_documents([[b"abc\xff"]]))


def test_file_tokenizer_reads_special_tokens_and_bounds_ids_with_gaps(bpe, tmp_path):
    assert bpe.encode("a<|endoftext|>") == [*bpe.encode("a"), 0] and bpe.decode([0, 1]) == "<|endoftext|><|padding|>"
    text = bpe.library.to_str().replace('"B":35', '"B":5000')
    (tmp_path / "gaps.json").write_text(text)
    gaps = get_tokenizer(str(tmp_path / "gaps.json"))
    assert max(gaps.encode("ABC")) == 5000 == gaps.vocab_size - 1


@pytest.mark.parametrize("block_bytes", [13, 1 << 20])
def test_encode_documents_gives_the_tokens_of_the_whole_text(tokenizer, block_bytes):
    rng = np.random.default_rng(0)
    parts = [*TEXT.split(" "), "\n", "\n\n", "\n\n\n", "  ", "\t", "...\n"]
    texts = [" ".join(rng.choice(parts, size)).encode() for size in (20_000, 3, 200)]
    blocks = [[text[i : i + block_bytes] for i in range(0, len(text), block_bytes)] for text in texts]
    tokens = [[] for _ in texts]
    for index, ids in tokenizer.encode_documents(blocks):
        tokens[index].append(ids)
    for text, ids in zip(texts, tokens, strict=True):
        assert np.concatenate(ids).tolist() == tokenizer.encode(text.decode())
    if tokenizer.name != "bytes":
        assert len(tokens[0]) > 1, "long enough to be cut"


def library_of(text, pre_tokenizer, vocab_size, path):
    """A tokenizer with that pre-tokenizer, trained on `text` and read from the file `path`."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    library.train_from_iterator([text] * 50, trainer)
    library.save(str(path))
    return get_tokenizer(str(path))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_encode_documents_does_not_cut_for_a_tokenizer_that_marks_beginnings(scheme, tmp_path):
    marks = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    line = "alpha beta\n"
    tokenizer = library_of(line, marks, 60, tmp_path / "tokenizer.json")
    [(_, ids)] = tokenizer.encode_documents([[(line * 20_000).encode()]])
    assert ids.tolist() == tokenizer.encode(line * 20_000)


def added(content, normalizer=None, **flags):
    def change(library):
        library.normalizer = normalizer
        library.add_tokens([tokenizers.AddedToken(content, **flags)])

    return change


SPLIT = tokenizers.pre_tokenizers.Split
ACROSS_CUTS = {
    "a space": (added("York is"), "New York is a city\n"),
    "a line break": (added("\nNew"), "a city\nNew York\n"),
    "a space at its end": (added("York "), "New York is a city\n"),
    "a space once normalised": (added("York\u00a0is", tokenizers.normalizers.NFKC()), "New York is a city\n"),
    "a space as SentencePiece writes it": (
        added("York▁is", tokenizers.normalizers.Replace(" ", "▁")),
        "New York is a city\n",
    ),
    "white space before it": (added("York", lstrip=True), "New\nYork\n"),
    "white space after it": (added("York", rstrip=True), "New York is a city\n"),
    "no pre-tokenizer": (lambda library: setattr(library, "pre_tokenizer", None), "New York is a city\n"),
    "pieces of one length": (
        lambda library: setattr(library, "pre_tokenizer", tokenizers.pre_tokenizers.FixedLength(7)),
        "New York is a city\n",
    ),
    "the pre-tokenizer of GPT-4o": (
        lambda library: setattr(
            library, "pre_tokenizer", SPLIT(tokenizers.Regex(r"[^\s\w]+[\r\n/]*| ?\w+|\s+"), "isolated")
        ),
        "New. York.\n/is\n",
    ),
}


def assert_cut_anywhere_as_whole(tokenizer, text):
    cut = [piece.decode() for piece in pieces(tokenizer, [text.encode()], num_bytes=1)]
    assert [i for piece in cut for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_pieces_of_text_without_a_cut_are_one_that_is_searched_once(monkeypatch):
    searched = []

    class Cut:
        def search(self, text, begin):
            searched.append(len(text) - begin)
            return cut.search(text, begin)

    tokenizer = dataclasses.replace(characters([TEXT]), cuttable=True)
    cut = data_tokenizers._CUT
    monkeypatch.setattr(data_tokenizers, "_CUT", Cut())
    blocks = ["日本語".encode() * 100] * 50 + [b"a", b" ", b"b"]
    found = list(pieces(tokenizer, blocks, num_bytes=100))
    assert found == [b"".join(blocks[:51]), b" b"]  # the text around the cut lies in three blocks
    assert sum(searched) < 1.1 * 50 * 900


@pytest.mark.parametrize("kind", ACROSS_CUTS)
def test_pieces_never_cut_inside_a_token(kind, tmp_path):
    change, line = ACROSS_CUTS[kind]
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    change(library)
    letters = [*string.ascii_letters, *"/.ĠĊ▁ \n"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, show_progress=False, initial_alphabet=letters)
    library.train_from_iterator([line] * 50, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    assert_cut_anywhere_as_whole(get_tokenizer(str(tmp_path / "tokenizer.json")), line * 20)


def test_file_tokenizer_ignores_stored_truncation_padding_and_dropout(bpe, tmp_path, capsys):
    library = tokenizers.Tokenizer.from_str(bpe.library.to_str())
    library.enable_truncation(4)
    library.enable_padding(length=1000)
    library.model.dropout = 0.5
    ends = [("<|endoftext|>", 0)]
    library.post_processor = tokenizers.processors.TemplateProcessing("$A <|endoftext|>", special_tokens=ends)
    path = str(tmp_path / "stored.json")
    library.save(path)
    assert get_tokenizer(path).encode(TEXT) == get_tokenizer(path).encode(TEXT) == bpe.encode(TEXT)
    assert capsys.readouterr().err == f"{path}: its truncation and padding and dropout will not be applied\n"


def test_encode_documents_never_cuts_between_a_line_break_and_a_wide_space(tmp_path):
    """Chinese text is indented by U+3000, and GPT-2's pre-tokenizer joins it to the line break before it."""
    gpt2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    line = "word.\n\u3000word.\n"
    tokenizer = library_of(line, gpt2, 300, tmp_path / "tokenizer.json")
    ids = [ids for _, ids in tokenizer.encode_documents([[(line * 10_000).encode()]])]
    assert len(ids) > 1 and np.concatenate(ids).tolist() == tokenizer.encode(line * 10_000)


def test_text_stream_never_emits_a_broken_character(tokenizer):
    stream, ids = TextStream(tokenizer), tokenizer.encode(TEXT)
    for _ in range(2):  # flush resets the stream
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) == TEXT and "\ufffd" not in TEXT
        # Text comes as soon as it can: a piece is empty only inside a character.
        for n, piece in enumerate(pieces, start=1):
            assert "\ufffd" not in piece
            assert piece or tokenizer.decode(ids[:n]).endswith("\ufffd")
        first = tokenizer.encode("é")[:1]
        assert stream.push(first[0]) + stream.flush() == tokenizer.decode(first)


def test_text_stream_of_any_tokens_equals_decode(tokenizer, examples=80):
    """Draws ids from the whole vocabulary, then ids most of which are parts of characters."""
    beyond = 0 if tokenizer.name == "bytes" else 40  # ids of a padded vocabulary, without text
    last = tokenizer.vocab_size - 1 + beyond
    parts = [piece for text in ("é日😀a", TEXT) for piece in tokenizer.encode(text)]
    torn = np.array([*parts, *range(min(257, last)), 0, last])
    rng = np.random.default_rng(examples)
    for _ in range(examples):
        size = rng.integers(61)
        ids = (rng.integers(0, last + 1, size) if rng.integers(2) else rng.choice(torn, size)).tolist()
        stream, shown = TextStream(tokenizer), ""
        for n, token in enumerate(ids, start=1):
            shown += stream.push(token)
            now = tokenizer.decode(ids[:n])
            assert now.startswith(shown) and (now == shown or now.endswith("\ufffd")), ids[:n]
        assert shown + stream.flush() == tokenizer.decode(ids), ids


def test_text_stream_completes_a_character_after_many_ids_without_text(bpe):
    first, *rest = bpe.encode("é")
    stream = TextStream(bpe)
    assert [stream.push(token) for token in [first, *[bpe.vocab_size] * 30]] == [""] * 31
    assert "".join(map(stream.push, rest)) + stream.flush() == "é"


def test_text_stream_of_a_sentencepiece_model_keeps_spaces_and_characters(tmp_path):
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


def test_text_stream_decodes_a_bounded_number_of_tokens():
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


def test_get_tokenizer_names_a_missing_or_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer file nowhere\.json: expected 'bytes', 'world' or"):
        get_tokenizer("nowhere.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is not a file that the tokenizers library reads: ") as e:
        get_tokenizer(str(tmp_path / "broken.json"))
    assert "\n" not in str(e.value)


# ---- characters


def test_characters_are_numbered_by_code_point_after_separator_and_unknown():
    tokenizer = characters(["banana\n", "é😀"])
    assert tokenizer.encode("\nabné😀") == [2, 3, 4, 5, 6, 7] and tokenizer.vocab_size == 8
    assert tokenizer.encode("\0x") == [0, 1] and tokenizer.decode([0, 1, 3]) == "\0\ufffda"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8"])
def test_get_tokenizer_reads_the_character_lists_of_the_released_code(encoding, tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({str(i): c for i, c in enumerate("\n é日😀")}, ensure_ascii=False), encoding=encoding)
    tokenizer = get_tokenizer(str(path))
    assert tokenizer.vocab_size == 5 and tokenizer.encode("日 é\n😀") == [3, 1, 2, 0, 4]
    assert tokenizer.decode([3, 1, 2, 0, 4]) == "日 é\n😀"
    with pytest.raises(ValueError, match=r"vocab\.json cannot encode the text: .*not found in the vocabulary"):
        tokenizer.encode("x")


@pytest.mark.parametrize("text", ['{"0": "ab"}', '{"0": "a", "1": "a"}', '{"0": "a"', '{"0": {}}'])
def test_get_tokenizer_refuses_a_damaged_list_of_characters(text, tmp_path):
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(ValueError, match=r"vocab\.json: expected a list of characters, "):
        get_tokenizer(str(tmp_path / "vocab.json"))


# ---- World


def test_world_tokenizer_has_the_released_ids(world):
    assert (world.name, world.vocab_size) == ("world", 65_536)
    assert world.encode("a\0") == [98, 1] and world.encode("Hello world") == [33155, 40213]
    assert world.decode([0]) == world.decode([65_530, 65_535]) == ""
    # byte b is id b + 1; decoding looks at bytes, not at tokens
    assert world.decode([0xE6 + 1, 0x97 + 1, 0xA5 + 1]) == "日"
    assert world.decode([0xE6 + 1, 0, 0x97 + 1]) == "\ufffd" and world.decode([0x80 + 1, 98]) == "\ufffda"


def test_get_tokenizer_reads_the_world_vocabulary_from_json(world, tmp_path):
    entries = {str(i): token for i, token in enumerate(world.token_bytes) if token}
    for i, token in entries.items():
        try:
            entries[i] = token.decode()
        except UnicodeDecodeError:
            entries[i] = list(token)
    for mark in ("", "\ufeff"):
        (tmp_path / "world.json").write_text(mark + json.dumps(entries))
        found = get_tokenizer(str(tmp_path / "world.json"))
        assert found.token_bytes == world.token_bytes and found.encode(TEXT) == world.encode(TEXT)


def test_pieces_never_cut_inside_a_token_of_another_world_vocabulary(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer", reason="the World tokenizer is an extra")
    tokens = [*map(chr, range(128)), "York is"]
    (tmp_path / "own.txt").write_text("".join(f"{i} {t!r} {len(t)}\n" for i, t in enumerate(tokens, 1)))
    assert_cut_anywhere_as_whole(get_tokenizer(str(tmp_path / "own.txt")), "New York is a city\n" * 20)


def test_get_tokenizer_names_the_missing_package_of_world(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyrwkv_tokenizer", None)
    with pytest.raises(ValueError, match=r"pip install pyrwkv-tokenizer$"):
        get_tokenizer("world")


DAMAGED = [
    "1 'a' 2\n",
    "70000 'a' 1\n",
    "1 'a\n",
    "1 'a' 1\nrubbish\n",
    '{"1": [300]}',
    '{"1": [128], "-2": "a"}',
    pytest.param("1 'a' 1\n2 " + "-" * 5000 + "1 1\n", id="nested too deep"),
]


@pytest.mark.parametrize("line", DAMAGED)
def test_get_tokenizer_refuses_a_damaged_world_vocabulary(line, tmp_path):
    (tmp_path / "vocab.txt").write_text(line)
    with pytest.raises(ValueError, match=r"vocab\.txt is not the World vocabulary: "):
        get_tokenizer(str(tmp_path / "vocab.txt"))


def test_get_tokenizer_skips_a_byte_order_mark(tmp_path):
    library = characters(["ab"]).library.to_str()
    for name, content in (("library", library), ("characters", '{"0": "b", "1": "a"}')):
        (tmp_path / name).write_text("\ufeff" + content)
        assert get_tokenizer(str(tmp_path / name)).encode("ba") == ([3, 2] if name == "library" else [0, 1])


def test_get_tokenizer_reads_a_file_whose_name_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/K\xe4se.json")
    characters(["ab"]).library.save(str(tmp_path / "ab.json"))
    (tmp_path / "ab.json").rename(path)
    assert get_tokenizer(path).encode("ba") == [3, 2]
