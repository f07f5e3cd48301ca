"""Text that continues a prompt: what is public, by file."""

from rwkv_jax.generate.context import CACHE_STEP, Context, PrefixCache, concatenate, rows
from rwkv_jax.generate.decode import DISPATCH, PROMPT_CHUNK, generate, generate_with_context, logits, read
from rwkv_jax.generate.prefixes import read_many
from rwkv_jax.generate.sampling import sampler
from rwkv_jax.generate.saved import load_context, save_context
from rwkv_jax.generate.text import Result, Stream, generate_texts, stream
from rwkv_jax.interop import fingerprint

__all__ = [
    "CACHE_STEP", "DISPATCH", "PROMPT_CHUNK", "Context", "PrefixCache", "Result", "Stream", "concatenate",
    "fingerprint", "generate", "generate_texts", "generate_with_context", "load_context", "logits", "read",
    "read_many", "rows", "sampler", "save_context", "stream",
]  # fmt: skip
