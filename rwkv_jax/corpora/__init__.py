"""Text or tokens -> memory-mapped train, validation and test splits.

`prepare` takes the embedded corpus (the source of Python's own standard library), text, JSONL or token files.
Text becomes tokens once for each text and tokenizer; they lie in a cache folder, `cache_dir()`.

Each document is preceded by the separator, token 0, as in the data and the evaluation of the released models,
so that its first token is predicted too.
"""

from rwkv_jax.corpora.build import prepare, to_megatron
from rwkv_jax.corpora.cache import cache_dir
from rwkv_jax.corpora.corpus import SEPARATOR, Corpus, Split

__all__ = ["SEPARATOR", "Corpus", "Split", "cache_dir", "prepare", "to_megatron"]
