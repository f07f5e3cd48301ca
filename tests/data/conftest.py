"""A cache and a tokenizer of their own for tests of corpora."""

import pytest
import tokenizers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """Path of a trained byte-level BPE tokenizer."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 10], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    library.save(str(path))
    return str(path)
