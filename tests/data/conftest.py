"""A cache and tokenizers of their own for the tests of corpora."""

import pytest
from texts import byte_level

from rwkv_jax.data.tokenizers import get_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """Path of a trained byte-level BPE tokenizer."""
    text = "the quick brown fox jumps over the lazy dog "
    return byte_level(tmp_path_factory.mktemp("bpe") / "tokenizer.json", text)


@pytest.fixture(scope="session")
def world():
    pytest.importorskip("pyrwkv_tokenizer", reason="the World tokenizer is an extra")
    return get_tokenizer("world")
