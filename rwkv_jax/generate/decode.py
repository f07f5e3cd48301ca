"""Reading prompts and drawing what follows: tokens in, tokens out.

A prompt is read many tokens at a time, in the parallel form; decoding then draws a token from the last logits and
reads it, one after the other, several in one call of a compiled function. Both are compiled once for a model and a
batch size, whatever the settings of the sampler and the number of tokens; prompts share three shapes, whatever their
length. A row of a batch ends by itself: from then on nothing it remembers changes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from rwkv_jax.generate import sampling
from rwkv_jax.generate.context import Context, begin, check, with_room
from rwkv_jax.models import per_layer

PROMPT_CHUNK = 256  # tokens of a prompt read at one time
FIRST_CHUNKS = (16, 64, PROMPT_CHUNK)  # of these the first chunk is the shortest that will do
DISPATCH = 32  # tokens decoded before they reach the host, at most
LIKELY = 1024  # new tokens for which caches have room from the start


def read(model, params, prompts, context: Context | None = None) -> Context:
    """What the model remembers after reading the prompts.

    Memory does not grow with their length: `PROMPT_CHUNK` tokens at a time. The first chunk holds the rest, one of
    `FIRST_CHUNKS` filled up with padding on its left: few shapes to compile, at most four times the work for a prompt
    of more than 16 tokens. Prompts of different lengths are filled up on their left to the longest.

    Args:
        prompts: ids in [0, V): [T], [B, T], or B lists of any lengths. An empty one is nothing after a context, and
            without one the separator, token 0, after which documents begin.
        context: of as many texts, after which the prompts come; stays as it is. None: nothing.
    """
    model, params = per_layer(model, params)
    rows, _ = as_prompts(prompts, model.vocab_size, context)
    return read_on(model, params, begin(model, context, len(rows), max(map(len, rows))), rows)


def read_on(model, params, context: Context, prompts: list[np.ndarray]) -> Context:
    """`read` for parameters of one layer each and a context of its own with enough room, which is used up."""
    for chunk in _chunks(prompts):
        context = _read(model, params, context, *chunk)
    return context


def _chunks(prompts):
    """(tokens_BT, valid_BT, whether it is the last) of each chunk of the prompts."""
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
    """Logits [T, V] of what follows each token of each prompt, float32 at least, and what `read` returns.

    Takes and refuses what `read` does. All logits are kept on the host, twice while they are joined.
    """
    model, params = per_layer(model, params)
    rows, _ = as_prompts(prompts, model.vocab_size, context)
    context = begin(model, context, len(rows), max(map(len, rows)))
    found = [np.zeros((len(rows), 0, model.vocab_size), context.logits_BV.dtype)]
    for tokens_BT, valid_BT, _ in _chunks(rows):
        logits_BTV, context = _logits(model, params, context, tokens_BT, valid_BT)
        found.append(np.asarray(logits_BTV))
    found_BTV = np.concatenate(found, axis=1)
    return [row_TV[len(row_TV) - len(row) :] for row_TV, row in zip(found_BTV, rows, strict=True)], context


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _logits(model, params, context, tokens_BT, valid_BT):
    logits_BTV, state = model.apply({"params": params}, tokens_BT, context.state, valid_BT=valid_BT)
    last_BV = jnp.where(valid_BT.any(1, keepdims=True), logits_BTV[:, -1], context.logits_BV)
    return logits_BTV, Context(state, last_BV)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, context, tokens_BT, valid_BT, last):
    """The context after a chunk; its logits are left as they are before the last one, and where all is padding."""
    x_BTD, state = model.apply({"params": params}, tokens_BT, context.state, valid_BT=valid_BT, method="hidden")
    logits = lambda: model.apply({"params": params}, x_BTD[:, -1], method="logits")
    logits_BV = lax.cond(last, logits, lambda: context.logits_BV)
    return Context(state, jnp.where(valid_BT.any(1, keepdims=True), logits_BV, context.logits_BV))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """B texts that are being continued.

    Attributes:
        context: after the prompts and the tokens so far.
        history: what the sampler knows of them.
        sampler, stop_V: how tokens are drawn, and which of them end a text.
        key_B: token i of a row is drawn with its key folded with i.
        index_B: int64, on the host; i of the next token.
        left_B: int64, on the host; tokens still to come, 0 where the text has ended.
    """

    context: Context
    history: sampling.History
    sampler: Callable
    stop_V: jax.Array
    key_B: jax.Array
    index_B: np.ndarray
    left_B: np.ndarray


def prepare(
    model,
    params,
    prompts: list[np.ndarray],
    *,
    context: Context | None = None,
    max_new_tokens: int | Sequence[int] = 100,
    sampler: Callable | None = None,
    seed: int | Sequence[int] = 0,
    start: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    penalty_decay: float = 1.0,
    **settings,
) -> Callable[[], Progress]:
    """Arguments are checked now, see `generate`; the function that comes back reads the prompts."""
    B, V = len(prompts), model.vocab_size
    if sampler is not None and settings:
        raise ValueError(f"both a sampler and {next(iter(settings))}, expected one or the other")
    sampler = sampling.sampler(**settings) if sampler is None else sampler
    sampling.check_vocabulary(sampler, V)
    left_B = _whole_numbers("max_new_tokens", max_new_tokens, B, 0)
    index_B = _whole_numbers("start", start, B, 0)
    seed_B = _whole_numbers("seed", seed, B, 0)
    stop_V = np.zeros(V, bool)
    for token in stop_tokens:
        if not 0 <= token < V:
            raise ValueError(f"stop_tokens holds {token}, expected ids from 0 to {V - 1}")
        stop_V[token] = True
    if context is not None:
        check(model, context, B)
    room = max(map(len, prompts)) + int(min(left_B.max(), LIKELY))
    history = sampling.history(B, V, prompts, decay=penalty_decay, sampler=sampler)
    if not isinstance(sampler, Partial):
        sampler = Partial(sampler)

    def progress():
        key_B = _keys(seed_B.astype(np.uint32), np.ndim(seed) == 0)
        after = read_on(model, params, begin(model, context, B, room), prompts)
        return Progress(after, history, sampler, jnp.asarray(stop_V), key_B, index_B, left_B)

    return progress


@partial(jax.jit, static_argnums=1)
def _keys(seed_B, shared):
    """A key for each row, of its seed; of one `shared` seed the first row's is the seed's own."""
    key_B = jax.vmap(jax.random.key)(seed_B)
    if not shared:
        return key_B
    row_B = (-np.arange(len(seed_B))).astype(np.uint32)  # from the upper end, where no token's index comes
    return jnp.where(row_B == 0, key_B, jax.vmap(jax.random.fold_in)(key_B, row_B))


def advance(model, params, progress: Progress, count: int = DISPATCH) -> tuple[list[list[int]], Progress]:
    """At most `count` new tokens of every row, up to `DISPATCH`. Uses up the arrays of `progress`.

    What stops a row is not among its tokens, and has not been read.
    """
    quota_B = np.minimum(progress.left_B, count)
    room = int(quota_B.max())
    context = with_room(model, progress.context, room, int(min(progress.left_B.max(), 2**30)))
    drawn = (progress.sampler, progress.stop_V, progress.key_B, progress.index_B.astype(np.uint32))
    context, history, tokens_BT, count_B = _decode(
        model, params, context, progress.history, *drawn, quota_B.astype(np.int32)
    )
    tokens_BT, count_B = np.asarray(tokens_BT), np.asarray(count_B)
    stopped_B = count_B < quota_B
    for b in np.flatnonzero(stopped_B):
        if tokens_BT[b, count_B[b]] < 0:
            raise ValueError(f"row {b} has no token to draw: all are banned, or its logits are not finite")
    left_B = np.where(stopped_B, 0, progress.left_B - count_B)
    tokens = [row[:n].tolist() for row, n in zip(tokens_BT, count_B, strict=True)]
    index_B = progress.index_B + count_B
    return tokens, replace(progress, context=context, history=history, index_B=index_B, left_B=left_B)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(model, params, context, history, sampler, stop_V, key_B, index_B, quota_B):
    """(context, history, tokens [B, DISPATCH], how many of them each row has) after at most `quota_B` tokens.

    Token i is drawn with a key of its own, so that it does not depend on how the text is cut into calls.
    """
    B = len(quota_B)

    def going(carry):
        i, *_, quota_B = carry
        return (i < quota_B).any()

    def step(carry):
        i, context, history, tokens_BT, quota_B = carry
        token_B = sampler(context.logits_BV, jax.vmap(jax.random.fold_in)(key_B, index_B + i), history)
        tokens_BT = tokens_BT.at[:, i.astype(jnp.int32)].set(token_B)
        token_B = jnp.maximum(token_B, 0)
        stops_B = stop_V[token_B] | (tokens_BT[:, i.astype(jnp.int32)] < 0)
        reads_B = (i < quota_B) & ~stops_B
        state, old_BV = context.state, context.logits_BV
        logits_B1V, state = model.apply({"params": params}, token_B[:, None], state, valid_BT=reads_B[:, None])
        context = Context(state, jnp.where(reads_B[:, None], logits_B1V[:, 0], old_BV))
        quota_B = jnp.where(reads_B, quota_B, jnp.minimum(quota_B, i.astype(jnp.int32)))
        return i + 1, context, history.add(token_B), tokens_BT, quota_B

    tokens_BT = jnp.zeros((B, DISPATCH), jnp.int32)
    carry = (jnp.uint32(0), context, history, tokens_BT, quota_B)
    _, context, history, tokens_BT, quota_B = lax.while_loop(going, step, carry)
    return context, history, tokens_BT, quota_B


def generate(model, params, prompt_ids, **settings) -> list[int] | list[list[int]]:
    """Tokens that continue a prompt: a list of ids, or one for each of B prompts.

    Parameters that are stacked (`scan=True`) are unstacked in each call, which takes their size in memory once more;
    those of `load(path, scan=False)` are used as they are.

    Args:
        prompt_ids: ids in [0, V): [T], [B, T], or B lists of any lengths. An empty prompt is what comes after the
            context; without one the separator, token 0, after which documents begin.
        context: a `Context` that the prompts continue; stays as it is.
        max_new_tokens: one number, 0 or more, or one for each row.
        sampler: a function, see `sampling`; by default `sampling.sampler(**settings)`: temperature, top_p, top_k,
            min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, bad_words_ids.
        seed: in [0, 2^32). A row's draws depend on its own seed and logits only. One number for several rows stands
            for a seed of its own in each, of which the first is the number itself.
        start: index of the first new token among the draws of its seed. Ten tokens, and then ten from the context
            after them with start=10, are the twenty of one call. (Counts of penalties begin anew in each call.)
        stop_tokens: ids that end a row. They are not part of the result.
        penalty_decay: by which the counts of the penalties shrink with every token, see `sampling.History`.
    """
    return generate_with_context(model, params, prompt_ids, **settings)[0]


def generate_with_context(model, params, prompt_ids, *, context=None, **settings) -> tuple[list, Context]:
    """`generate`, and the context that has read the prompts and exactly its result."""
    model, params = per_layer(model, params)
    prompts, single = as_prompts(prompt_ids, model.vocab_size, context)
    progress = prepare(model, params, prompts, context=context, **settings)()
    tokens = [[] for _ in prompts]
    while progress.left_B.any():
        new, progress = advance(model, params, progress)
        for row, more in zip(tokens, new, strict=True):
            row += more
    return (tokens[0] if single else tokens), progress.context


def as_prompts(prompts, vocab_size: int, context: Context | None) -> tuple[list[np.ndarray], bool]:
    """(ids of each prompt, whether it is one prompt rather than several); empty ones are token 0 without a context."""
    several = np.ndim(prompts) == 2 if hasattr(prompts, "ndim") else any(map(np.ndim, prompts))
    rows = [np.asarray(row) for row in (prompts if several else [prompts])]
    for row in rows or [np.asarray(prompts)]:
        if not rows or row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise ValueError(f"the prompt is {row.dtype} {row.shape}, expected ids [T] or [B, T], or lists of ids")
        wrong = row[(row < 0) | (row >= vocab_size)]
        if wrong.size:
            raise ValueError(f"the prompt holds token {wrong[0]}, expected ids from 0 to {vocab_size - 1}")
    rows = [row.astype(np.int32) if row.size or context is not None else np.zeros(1, np.int32) for row in rows]
    return rows, not several


def _whole_numbers(name: str, value, B: int, low: int) -> np.ndarray:
    """[B] int64, from one number or one for each row."""
    if np.ndim(value) > 1 or (np.ndim(value) == 1 and len(value) != B):
        raise ValueError(f"{name} is {value}, expected one number or one for each of {B} prompts")
    value_B = np.broadcast_to(np.asarray(value), B)
    for given in value_B:
        if value_B.dtype.kind not in "iu" or not low <= given < 2**32:
            raise ValueError(f"{name} is {given}, expected {low} to 2^32 - 1")
    return value_B.astype(np.int64)
