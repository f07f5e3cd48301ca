"""JSONL sources: documents, templates, prompts and errors."""

from pathlib import Path

import numpy as np
import pytest
from texts import parts, splits_of, write_jsonl

from rwkv_jax.data import prepare
from rwkv_jax.data.tokenizers import get_tokenizer

SURROGATE = r"'utf-8' codec can't encode character '\ud800' in position 0: surrogates not allowed"
GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_makes_a_document_of_every_line(tmp_path, name):
    texts = [f"text {i} é" for i in range(300)]
    records = [{"text": text, "id": i} for i, text in enumerate(texts)] + [{"text": ""}, {"text": texts[7]}]
    corpus = prepare(write_jsonl(tmp_path / name, records))
    found = [parts(split) for split in splits_of(corpus)]
    assert sorted(text.decode() for split in found for text in split) == sorted([*texts, texts[7]])
    assert [split.num_bytes for split in splits_of(corpus)] == [sum(map(len, split)) for split in found]
    assert 5 < len(found[1]) < 30 and 5 < len(found[2]) < 30
    assert [split.count(texts[7].encode()) for split in found] in ([2, 0, 0], [0, 2, 0], [0, 0, 2])
    assert corpus.train.mask is None and corpus.train.names == ()


def test_jsonl_folder_is_split_by_file_names(tmp_path):
    folder = tmp_path / "set"
    write_jsonl(folder / "train-0.jsonl", [{"text": f"t{i}"} for i in range(50)])
    write_jsonl(folder / "train-1.jsonl.gz", [{"text": f"u{i}"} for i in range(50)])
    write_jsonl(folder / "validation.jsonl", [{"text": f"v{i}"} for i in range(5)])
    train, valid, test = (parts(split) for split in splits_of(prepare(str(folder))))
    assert valid == [b"v0", b"v1", b"v2", b"v3", b"v4"]
    assert len(train) + len(test) == 100 and 1 <= len(test) < 15
    assert {text[:1] for text in train} == {b"t", b"u"}


def test_jsonl_split_names_are_whole_words(tmp_path):
    trains = ["devices", "testimonials", "values", "validity", "développement", "my-test", "training"]
    for split, names in enumerate(
        (trains, ["dev", "val_0", "Validation-00000-of-00001"], ["test", "TEST.2", "test3"])
    ):
        for name in names:
            write_jsonl(tmp_path / "set" / f"{name}.jsonl", [{"text": f"{split} {name}"}])
    for split, found in enumerate(splits_of(prepare(str(tmp_path / "set")))):
        assert {text[:1] for text in parts(found)} == {b"%d" % split}


def test_jsonl_fills_three_splits_from_three_texts_and_refuses_two(tmp_path):
    corpus = prepare(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "a", "b", "c")]))
    assert [parts(split) for split in splits_of(corpus)] == [[b"a", b"a"], [b"b"], [b"c"]]
    source = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b"}, {"text": ""}])
    with pytest.raises(ValueError, match=r"b\.jsonl holds 2 documents with text: too few for train, valid and test"):
        prepare(source)


def test_jsonl_of_copies_says_that_they_count_as_one(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "always the same"}] * 300)
    with pytest.raises(ValueError, match=r"holds 300 documents with text: .*; copies count as one"):
        prepare(source)


def test_jsonl_prompt_is_masked(tmp_path):
    records = [{"question": f"Q{i}?", "answer": i, "more": None} for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    corpus = prepare(source, text=" {answer}", prompt="Question: {question}\n\nAnswer:")
    texts = []
    for split in splits_of(corpus):
        assert split.mask.dtype == np.uint8 and len(split.mask) == len(split.tokens)
        for tokens, mask in zip(*(np.split(x, split.starts[1:]) for x in (split.tokens, split.mask)), strict=True):
            number = int(bytes(tokens).split()[-1])
            prompt, text = f"Question: Q{number}?\n\nAnswer:", f" {number}"
            assert bytes(tokens) == b"\0" + (prompt + text).encode()
            assert mask.tolist() == [1] + [0] * len(prompt) + [1] * len(text)
            texts.append(bytes(tokens[1:]))
    assert len(texts) == 60
    assert sum(split.num_bytes for split in splits_of(corpus)) == sum(len(text) for text in texts)


def test_jsonl_hash_depends_on_the_prompt_mask(tmp_path):
    texts = [{"a": f"{i}ab", "b": "c", "A": f"{i}a", "B": "bc"} for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    first, second = prepare(source, text="b", prompt="a"), prepare(source, text="B", prompt="A")
    assert first.train.tokens.tobytes() == second.train.tokens.tobytes() and first.sha256 != second.sha256


def test_jsonl_prompt_and_text_share_no_token(tmp_path):
    bpe = str(GOLDENS / "binidx_tokenizer.json")
    records = [{"a": "the sta", "b": "te of the text"} for _ in range(3)]
    records = [record | {"b": record["b"] + str(i)} for i, record in enumerate(records)]
    tokenizer = get_tokenizer(bpe)
    assert tokenizer.encode("the state") != tokenizer.encode("the sta") + tokenizer.encode("te")
    split = prepare(write_jsonl(tmp_path / "a.jsonl", records), bpe, "b", "a").train
    prompt, text = tokenizer.encode("the sta"), tokenizer.encode("te of the text0")
    assert split.tokens[: 1 + len(prompt) + len(text)].tolist() == [0, *prompt, *text]


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (b'{"text": "a"', {}, "not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (b"[1]", {}, "holds a JSON list, expected an object"),
        (b'{"body": "a", "id": 1}', {}, "no field 'text', only 'body', 'id'"),
        (b'{"text": true}', {}, "field 'text' is bool, expected text or a number"),
        (b'{"text": NaN}', {}, "field 'text' is nan, expected text or a finite number"),
        (b'{"text": "a"}', {"prompt": "Q: {q}"}, "no field 'q', only 'text'"),
        (b'{"text": "\xff"}', {}, "not JSON: 'utf-8' codec can't decode byte 0xff in position 10: invalid start byte"),
        (b'{"text": "a", "tree": ' + b"[" * 500 + b"]" * 500 + b"}", {}, "JSON nested more than 100 deep"),
        (b'{"text": "a", "tree": ' + b"[" * 100_000, {}, "not JSON: maximum recursion depth exceeded"),
        (b'{"text": ' + b"1" * 5000 + b"}", {}, "not JSON: Exceeds the limit"),
        (b'{"text": "\\ud800"}', {}, SURROGATE),
    ],
)
def test_jsonl_error_names_the_bad_line(tmp_path, cache, line, fields, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "q": "?"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as raised:
        prepare(str(tmp_path / "a.jsonl"), **fields)
    assert str(raised.value).startswith(f"{tmp_path / 'a.jsonl'}:3: {message}")
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("template", ["{", "{}", "{a!r}", "{a:>3}"])
def test_jsonl_refuses_a_bad_template(tmp_path, template):
    source = write_jsonl(tmp_path / "a.jsonl", [{"a": "b"}] * 3)
    with pytest.raises(ValueError, match=r"^template '"):
        prepare(source, text=template)


def test_jsonl_refuses_a_truncated_gzip(tmp_path):
    source = Path(write_jsonl(tmp_path / "a.jsonl.gz", [{"text": str(i)} for i in range(9999)]))
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged after line \d+: Compressed file ended before"):
        prepare(str(source))
