"""Prefill and decoding: tokens in, tokens out.

Prefill reads a prompt many tokens at a time, in the parallel form; three compiled shapes serve prompts of any length.
Decoding draws a token from the last logits and reads it; one call of a compiled function repeats this up to `DISPATCH`
times. One such function is compiled for each set of filters, whose values are arguments. A row whose text has ended
keeps its context bit for bit while other rows continue.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from rwkv_jax.data import SEPARATOR
from rwkv_jax.generate import sampling
from rwkv_jax.generate.context import Context, begin, with_room
from rwkv_jax.models import per_layer

PROMPT_CHUNK = 256  # tokens of a prompt read at one time
FIRST_CHUNKS = (16, 64, PROMPT_CHUNK)  # lengths of the first chunk; the shortest sufficient one is used
DISPATCH = 32  # most tokens decoded before they reach the host
LIKELY = 1024  # most new tokens for which caches are allocated at the start


def read(model, params, prompts, context: Context | None = None) -> Context:
    """Return the context after the prompts.

    Memory does not grow with their length: `PROMPT_CHUNK` tokens are read at a time. The first chunk holds the
    remainder, left-padded to one of the lengths `FIRST_CHUNKS`: few shapes to compile.

    Args:
        prompts: ids in [0, V): [T], [B, T], or B lists of any lengths. An empty one adds nothing to a context;
            without a context it is the separator, token 0, after which documents begin.
        context: of as many texts, which the prompts continue; it is not changed. None: the prompts begin documents.

    Raises:
        ValueError: no prompts, an id outside [0, V), or a context of another model or another number of texts.
    """
    model, params = per_layer(model, params)
    prompts, _ = as_prompts(prompts, model.vocab_size, context)
    return prefill(model, params, prompts, context)


def after_separator(model, params, state) -> Context:
    """Return the context after a state, B = 1, and the separator, with which every document begins."""
    no_logits_BV = jnp.zeros((1, model.vocab_size), jnp.promote_types(model.dtype, jnp.float32))
    return read(model, params, [[SEPARATOR]], Context(state, no_logits_BV))


def prefill(model, params, prompts: list[np.ndarray], context: Context | None, room: int = 0) -> Context:
    """Return the context of `read` for checked prompts and unstacked parameters, with room for more tokens."""
    context = begin(model, context, len(prompts), max(map(len, prompts)) + room)
    for tokens_BT, valid_BT, is_last in chunks(prompts):
        context = _read_chunk(model, params, context, tokens_BT, valid_BT, is_last)
    return context


def chunks(prompts):
    """Yield (tokens_BT, valid_BT, whether it is the last) of each chunk of the prompts."""
    T = max(map(len, prompts))
    rest = T % PROMPT_CHUNK
    first = next(n for n in FIRST_CHUNKS if rest <= n) if rest else PROMPT_CHUNK
    padded = T + (first - T) % PROMPT_CHUNK
    tokens_BT, valid_BT = np.zeros((len(prompts), padded), np.int32), np.zeros((len(prompts), padded), bool)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, padded - len(prompt) :], valid_BT[b, padded - len(prompt) :] = prompt, True
    for start, end in itertools.pairwise([0, *range(first, padded + 1, PROMPT_CHUNK)] if T else []):
        yield tokens_BT[:, start:end], valid_BT[:, start:end], end == padded


def logits(model, params, prompts, context: Context | None = None) -> tuple[list[np.ndarray], Context]:
    """Return the logits [T, V] after each token of each prompt, float32 at least, and what `read` returns.

    All logits are kept on the host, twice while they are concatenated.
    """
    model, params = per_layer(model, params)
    prompts, _ = as_prompts(prompts, model.vocab_size, context)
    context = begin(model, context, len(prompts), max(map(len, prompts)))
    found = [np.zeros((len(prompts), 0, model.vocab_size), context.logits_BV.dtype)]
    for tokens_BT, valid_BT, _ in chunks(prompts):
        logits_BTV, context = _logits_of_chunk(model, params, context, tokens_BT, valid_BT)
        found.append(np.asarray(logits_BTV))
    found_BTV = np.concatenate(found, axis=1)
    return [row_TV[len(row_TV) - len(prompt) :] for row_TV, prompt in zip(found_BTV, prompts, strict=True)], context


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_chunk(model, params, context, tokens_BT, valid_BT, is_last):
    """Return the context after a chunk; logits change only in the last chunk, and not in rows of padding."""
    x_BTD, state = model.apply({"params": params}, tokens_BT, context.state, valid_BT=valid_BT, method="hidden")
    head = lambda: model.apply({"params": params}, x_BTD[:, -1], method="logits")
    logits_BV = lax.cond(is_last, head, lambda: context.logits_BV)
    return Context(state, jnp.where(valid_BT.any(1, keepdims=True), logits_BV, context.logits_BV))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _logits_of_chunk(model, params, context, tokens_BT, valid_BT):
    logits_BTV, state = model.apply({"params": params}, tokens_BT, context.state, valid_BT=valid_BT)
    last_BV = jnp.where(valid_BT.any(1, keepdims=True), logits_BTV[:, -1], context.logits_BV)
    return logits_BTV, Context(state, last_BV)


@dataclass(frozen=True)
class Draws:
    """The pending draws of B texts.

    Attributes:
        history: the tokens of prompt and continuation, as far as the sampler needs them.
        stop_V: True for the tokens that end a text.
        key_B: token i of a row is drawn with the row's key folded with i.
        index_B: i of the next token; int64, on the host.
        left_B: number of pending tokens, 0 where the text has ended; int64, on the host.
    """

    sampler: Callable
    history: sampling.History
    stop_V: jax.Array
    key_B: jax.Array
    index_B: np.ndarray
    left_B: np.ndarray

    @property
    def room(self) -> int:
        """Number of new tokens for which caches are allocated at the start."""
        return int(min(self.left_B.max(), LIKELY))


def checked_draws(
    prompts: list[np.ndarray],
    vocab_size: int,
    *,
    max_new_tokens: int | Sequence[int] = 100,
    sampler: Callable | None = None,
    seed: int | Sequence[int] = 0,
    start: int | Sequence[int] = 0,
    stop_tokens: Iterable[int] = (SEPARATOR,),
    penalty_decay: float = 1.0,
    **settings,
) -> Draws:
    """Return all draws that `generate` with these arguments makes after the prompts; ValueError where one is wrong."""
    B = len(prompts)
    if sampler is not None and settings:
        raise ValueError(f"both a sampler and {next(iter(settings))}, expected one or the other")
    sampler = sampling.sampler(**settings) if sampler is None else sampler
    sampling.check_vocabulary(sampler, vocab_size)
    left_B = _whole_numbers("max_new_tokens", max_new_tokens, B)
    index_B = _whole_numbers("start", start, B)
    seed_B = _whole_numbers("seed", seed, B)
    stop_V = np.zeros(vocab_size, bool)
    stops = list(stop_tokens) if isinstance(stop_tokens, Iterable) else [stop_tokens]
    stop_V[checked_ids(stops, vocab_size, "stop_tokens")] = True
    history = sampling.history(prompts, vocab_size, penalty_decay, sampler)
    sampler = sampler if isinstance(sampler, Partial) else Partial(sampler)
    key_B = _keys(seed_B.astype(np.uint32), np.ndim(seed) == 0)
    return Draws(sampler, history, jnp.asarray(stop_V), key_B, index_B, left_B)


@partial(jax.jit, static_argnums=1)
def _keys(seed_B, shared):
    """Return a key for each row, from its seed; with one `shared` seed, the first row has the seed's own key."""
    key_B = jax.vmap(jax.random.key)(seed_B)
    if not shared:
        return key_B
    row_B = (-np.arange(len(seed_B))).astype(np.uint32)  # from the upper end, which no token's index reaches
    return jnp.where(row_B == 0, key_B, jax.vmap(jax.random.fold_in)(key_B, row_B))


def advance(model, params, context: Context, draws: Draws, count: int = DISPATCH):
    """Draw and read at most `count` tokens of every row, up to `DISPATCH`.

    Donates the arrays of `context` and the history of `draws`. A token that stops a row is neither returned nor read.

    Returns:
        the new tokens, a list for each row; the context and the draws after them.
    """
    quota_B = np.minimum(draws.left_B, count)
    context = with_room(model, context, int(quota_B.max()), int(min(draws.left_B.max(), 2**30)))
    draw_args = (draws.sampler, draws.stop_V, draws.key_B, draws.index_B.astype(np.uint32), quota_B.astype(np.int32))
    context, history, tokens_BT, count_B = _decode(model, params, context, draws.history, *draw_args)
    tokens_BT, count_B = np.asarray(tokens_BT), np.asarray(count_B)
    stopped_B = count_B < quota_B
    for b in np.flatnonzero(stopped_B):
        if tokens_BT[b, count_B[b]] < 0:
            raise ValueError(f"row {b} has no token to draw: all are banned, or its logits are not finite")
    left_B = np.where(stopped_B, 0, draws.left_B - count_B)
    tokens = [row_T[:n].tolist() for row_T, n in zip(tokens_BT, count_B, strict=True)]
    return tokens, context, replace(draws, history=history, index_B=draws.index_B + count_B, left_B=left_B)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(model, params, context, history, sampler, stop_V, key_B, index_B, quota_B):
    """Return (context, history, tokens [B, DISPATCH], number of tokens [B]) after at most `quota_B` tokens.

    Each token has its own key, so that the text does not depend on how it is split into calls.
    """
    B = len(quota_B)

    def going(carry):
        i, *_, quota_B = carry
        return (i < quota_B).any()

    def step(carry):
        i, context, history, tokens_BT, quota_B = carry
        token_key_B = jax.vmap(jax.random.fold_in)(key_B, index_B + i.astype(jnp.uint32))
        token_B = sampler(context.logits_BV, token_key_B, history)
        tokens_BT = tokens_BT.at[:, i].set(token_B)
        reads_B = (i < quota_B) & (token_B >= 0) & ~stop_V[token_B]
        token_B = jnp.maximum(token_B, 0)
        logits_B1V, state = model.apply({"params": params}, token_B[:, None], context.state, valid_BT=reads_B[:, None])
        context = Context(state, jnp.where(reads_B[:, None], logits_B1V[:, 0], context.logits_BV))
        quota_B = jnp.where(reads_B, quota_B, jnp.minimum(quota_B, i))
        return i + 1, context, history.add(token_B), tokens_BT, quota_B

    tokens_BT = jnp.zeros((B, DISPATCH), jnp.int32)
    carry = (jnp.int32(0), context, history, tokens_BT, quota_B)
    _, context, history, tokens_BT, quota_B = lax.while_loop(going, step, carry)
    return context, history, tokens_BT, quota_B


def generate(model, params, prompt_ids, **settings) -> list[int] | list[list[int]]:
    """Return the tokens that continue a prompt: a list of ids, or one for each of B prompts.

    Stacked parameters (`scan=True`) are unstacked in each call, which takes their size in memory once more; those of
    `load(path, scan=False)` are used as they are.

    Args:
        prompt_ids, context: see `read`.
        max_new_tokens: one number, 0 or more, or one for each row.
        sampler: a function, see `sampling`; by default `sampling.sampler(**settings)`.
        seed: in [0, 2^32), one number or one for each row. A row's draws depend on its own seed and logits only. If
            several rows share one number, the first row uses it, and the others derive their own from it.
        start: index of the first new token among the draws of its seed. Ten tokens, then ten from the context after
            them with start=10, equal the twenty of one call, except that counts of penalties restart in each call.
        stop_tokens: ids that end a row. They are not part of the result. By default the separator, 0, after which
            another document begins.
        penalty_decay: factor on the counts of the penalties at every token, see `sampling.History`.

    Raises:
        ValueError: as from `read`; an invalid setting; or a row without a token to draw, because all are banned or its
            logits are not finite.
    """
    return generate_with_context(model, params, prompt_ids, **settings)[0]


def generate_with_context(model, params, prompt_ids, *, context=None, **settings) -> tuple[list, Context]:
    """Return what `generate` returns, and the context after the prompts and exactly these tokens."""
    model, params = per_layer(model, params)
    prompts, single = as_prompts(prompt_ids, model.vocab_size, context)
    draws = checked_draws(prompts, model.vocab_size, **settings)
    context = prefill(model, params, prompts, context, draws.room)
    tokens = [[] for _ in prompts]
    while draws.left_B.any():
        new, context, draws = advance(model, params, context, draws)
        for row, more in zip(tokens, new, strict=True):
            row += more
    return (tokens[0] if single else tokens), context


def as_prompts(prompts, vocab_size: int, context: Context | None) -> tuple[list[np.ndarray], bool]:
    """Return the ids of each prompt, and whether a single one was given; without context, an empty one is token 0."""
    several = np.ndim(prompts) == 2 if hasattr(prompts, "ndim") else any(map(np.ndim, prompts))
    given = [checked_ids(ids, vocab_size) for ids in (prompts if several else [prompts])]
    if not given:
        raise ValueError(f"there are no prompts in {prompts!r}, expected ids [T] or [B, T], or lists of ids")
    empty = np.zeros(1 if context is None else 0, np.int32)
    return [ids if ids.size else empty for ids in given], not several


def checked_ids(ids, vocab_size: int, what: str = "the prompt") -> np.ndarray:
    """Return ids as an int32 array [T]; ValueError unless they are whole numbers in [0, V)."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{what} is {ids.dtype} {ids.shape}, expected ids [T] or [B, T], or lists of ids")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{what} holds token {wrong[0]}, expected ids from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def _whole_numbers(name: str, value, B: int) -> np.ndarray:
    """Return [B] int64 from one number, or from one for each row."""
    if np.ndim(value) > 1 or (np.ndim(value) == 1 and len(value) != B):
        raise ValueError(f"{name} is {value}, expected one number or one for each of {B} prompts")
    value_B = np.broadcast_to(np.asarray(value), B)
    if value_B.dtype.kind not in "iu" or (value_B < 0).any() or (value_B >= 2**32).any():
        raise ValueError(f"{name} is {value}, expected 0 to 2^32 - 1")
    return value_B.astype(np.int64)
