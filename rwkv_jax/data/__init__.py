"""Text or tokens -> memory-mapped train, validation and test splits.

`prepare` takes the embedded corpus (the source of Python's standard library), text, JSONL or token files. Tokens
are cached in `cache_dir()`, once for each text and tokenizer.

The separator, token 0, precedes each document, as in the evaluation of the released models, so that the document's
first token is a target too. In their token files it follows each document: only the ends of a file differ.
"""

from rwkv_jax.data.build import prepare, to_megatron
from rwkv_jax.data.cache import cache_dir
from rwkv_jax.data.corpus import SEPARATOR, Corpus, Split

__all__ = ["SEPARATOR", "Corpus", "Split", "cache_dir", "prepare", "to_megatron"]
