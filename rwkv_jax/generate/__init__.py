"""Generation of text from a prompt: the public names, by file."""

from rwkv_jax.generate.context import CACHE_STEP, Context, concatenate, rows
from rwkv_jax.generate.decode import (
    DISPATCH,
    PROMPT_CHUNK,
    after_separator,
    generate,
    generate_with_context,
    logits,
    read,
)
from rwkv_jax.generate.sampling import sampler
from rwkv_jax.generate.saved import load_context, save_context
from rwkv_jax.generate.text import Result, Stream, generate_texts, stream

__all__ = [
    "CACHE_STEP", "DISPATCH", "PROMPT_CHUNK", "Context", "Result", "Stream", "after_separator", "concatenate",
    "generate", "generate_texts", "generate_with_context", "load_context", "logits", "read",
    "rows", "sampler", "save_context", "stream",
]  # fmt: skip
