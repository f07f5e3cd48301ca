"""Raw text -> one memory-mapped token file with train, validation and test splits.

`prepare` takes the embedded corpus (the source of Python's own standard library), a text file or a folder.
The tokens are made once for each text and tokenizer, and lie in a cache folder, `cache_dir()`.

Each document is preceded by the separator, token 0, as in the data and the evaluation of the released models,
so that its first token is predicted too.
"""

from rwkv_jax.corpora.build import cache_dir, prepare
from rwkv_jax.corpora.corpus import SEPARATOR, Corpus, Split

__all__ = ["SEPARATOR", "Corpus", "Split", "cache_dir", "prepare"]
