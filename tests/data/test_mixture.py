"""Several corpora by weight, from one string."""

from fractions import Fraction

import numpy as np
import pytest

from rwkv_jax import data
from rwkv_jax.data import mixture


@pytest.fixture(scope="module", autouse=True)
def texts(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("RWKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("texts")
    for name, letter in (("a.txt", "a"), ("b.txt", "b"), ("c,d:3", "c")):
        (folder / name).write_text(f"{letter} line of some text\n" * 200)
    yield folder
    patch.undo()


@pytest.mark.parametrize("weights", [("0.7", "0.3"), ("70.", "30")])
def test_mixture_parses_sources_and_weights(weights, texts):
    mixed = mixture.prepare(
        ",".join(f"{texts / name}:{w}" for name, w in zip(("a.txt", "b.txt"), weights, strict=True))
    )
    assert mixed.weights == (Fraction(7, 10), Fraction(3, 10))
    assert mixed.name == f"a.txt:{weights[0]},b.txt:{weights[1]}"
    assert [part.name for part in mixed.parts] == ["a.txt", "b.txt"]
    assert [weight for _, weight in mixed.train] == list(mixed.weights)
    for (split, _), part in zip(mixed.train, mixed.parts, strict=True):
        np.testing.assert_array_equal(split.tokens, part.train.tokens)
    assert mixed.vocab_size == 256 and mixed.tokenizer == "bytes"


def test_mixture_hash_depends_on_texts_and_weights(texts):
    a, b = texts / "a.txt", texts / "b.txt"
    sources = [f"{a}:1,{b}:1", f"{a}:2,{b}:1", f"{a}:1,{a}:1"]
    assert len({mixture.prepare(source).sha256 for source in sources}) == 3
    assert mixture.prepare(f"{a}:1,{b}:1").sha256 == mixture.prepare(f"{a}:0.5,{b}:0.5").sha256


def test_mixture_of_one_corpus_equals_that_corpus(texts):
    for name in ("a.txt", "c,d:3"):  # an existing path is never parsed as a mixture
        alone, corpus = mixture.prepare(str(texts / name)), data.prepare(str(texts / name))
        assert alone[:4] == corpus[:4]
        assert alone.weights == (1,)
        np.testing.assert_array_equal(alone.held_out(50)[0], corpus.valid.tokens[:50])


def test_mixture_held_out_tokens_are_shared_by_weight(texts):
    mixed = mixture.prepare(f"{texts / 'a.txt'}:0.75,{texts / 'b.txt'}:0.25")
    a, b = (part.valid.tokens for part in mixed.parts)
    np.testing.assert_array_equal(mixed.held_out(40)[0], [*a[:30], *b[:10]])


def test_mixture_gives_held_out_text_targets():
    def held_out(mask):
        tokens = np.arange(100, dtype=np.uint8)
        split = data.Split(tokens, np.zeros(1, np.int64), (), 100, np.isin(tokens, mask).astype(np.uint8))
        corpus = data.Corpus("a", "bytes", 256, "", split, split, split)
        return mixture.Mixture("a", "bytes", 256, "", (corpus,), (Fraction(1),)).held_out(10)

    for mask, begin in (([0, 9], 0), ([0, 10], 5), ([0, 99], 94)):
        tokens, counts = held_out(mask)
        np.testing.assert_array_equal(tokens, np.arange(begin, min(begin + 10, 100)))
        np.testing.assert_array_equal(tokens[counts], [x for x in mask if x in tokens])
    with pytest.raises(ValueError, match="validation text of a has no target"):
        held_out([0])


@pytest.mark.parametrize(
    ("source", "tokenizer", "line"),
    [
        ("{}/a.txt:0.7,{}/b.txt", "bytes", "corpus part '.*b.txt' has no weight above 0, expected SOURCE:WEIGHT"),
        ("{}/a.txt:1,{}/b.txt:0", "bytes", "corpus part '.*b.txt:0' has no weight above 0"),
        ("{}/a.txt:1,{}/b.txt:1", "characters", "tokenizer is 'characters', expected one that does not depend"),
    ],
)
def test_mixture_refuses_bad_sources_and_weights(source, tokenizer, line, texts):
    with pytest.raises((ValueError, OSError), match=line):
        mixture.prepare(source.format(texts, texts), tokenizer)
