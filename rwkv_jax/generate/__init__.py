"""Text that continues a prompt.

`prefill` reads the prompt, many tokens at a time; decoding then draws a token from the last logits and reads it, one
after the other. The state is all that either remembers of the text: for RWKV it has one size, with attention it is a
cache for the prompt and all that follows. Decoding is compiled once for a model and a batch size, whatever the number
of tokens and the settings of the sampler; prompts share at most nine shapes, whatever their length.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax import tokenizers
from rwkv_jax.models import unstack

PROMPT_CHUNK = 256  # tokens of a prompt read at one time
DISPATCH = 32  # tokens decoded before they reach the host, at most
CACHE_STEP = 256  # caches are multiples of this, so that they share compiled functions


def prefill(model, params, tokens_BT, state=None):
    """Logits [B, V] of what follows `tokens_BT`, and the state after it.

    Memory does not grow with T: `PROMPT_CHUNK` tokens at a time. The first chunk is a power of 2 that holds the rest,
    filled up with padding on its left: few shapes to compile, at most twice the work for a short prompt.

    Args:
        tokens_BT: ids in [0, V), T >= 1.
        state: before the first token, left as it is; None is `model.init_state(B)`. With attention, pass
            `model.init_state(B, max_length)` for at least as many tokens as will ever be read.
    """
    B, T = tokens_BT.shape
    if T == 0:
        raise ValueError("no tokens to read, expected at least one")
    rest = T % PROMPT_CHUNK
    first = 1 << (rest - 1).bit_length() if rest else PROMPT_CHUNK
    padding = (first - T) % PROMPT_CHUNK
    tokens_BT = np.pad(np.asarray(tokens_BT, np.int32), ((0, 0), (padding, 0)))
    valid_BT = np.broadcast_to(np.arange(padding + T) >= padding, tokens_BT.shape)
    # A copy, because `_read` recycles the state that it is given.
    state = jax.tree.map(jnp.copy, model.init_state(B) if state is None else state)
    for begin, end in itertools.pairwise([0, *range(first, padding + T + 1, PROMPT_CHUNK)]):
        logits_BV, state = _read(model, params, state, tokens_BT[:, begin:end], valid_BT[:, begin:end])
    return logits_BV, state


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, state, tokens_BT, valid_BT):
    x_BTD, state = model.apply({"params": params}, tokens_BT, state, valid_BT=valid_BT, method="hidden")
    return model.apply({"params": params}, x_BTD[:, -1], method="logits"), state


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(model, params, logits_BV, state, key, begin, end, temperature, top_p):
    """Tokens `begin` to `end` of the text, at most `DISPATCH`: [B, DISPATCH], with the logits and state after them.

    Token i is drawn with a key of its own, so that it does not depend on how the text is cut into calls.
    """

    def step(i, carry):
        logits_BV, state, tokens_BT = carry
        token_B = _draw(logits_BV, jax.random.fold_in(key, i), temperature, top_p)
        logits_B1V, state = model.apply({"params": params}, token_B[:, None], state)
        return logits_B1V[:, 0], state, tokens_BT.at[:, i - begin].set(token_B)

    tokens_BT = jnp.zeros((len(logits_BV), DISPATCH), jnp.int32)
    logits_BV, state, tokens_BT = lax.fori_loop(begin, end, step, (logits_BV, state, tokens_BT))
    return tokens_BT, logits_BV, state


def sample(logits_BV, key, temperature: float = 1.0, top_p: float = 1.0):
    """A token [B] from softmax(logits / temperature), restricted to its likeliest tokens.

    Args:
        temperature: >= 0; 0 is the likeliest token, whatever the key.
        top_p: in (0, 1]. The tokens that stay are the smallest set whose probability reaches `top_p`, the one that
            crosses it included; of equal ones the lower ids. Temperature comes first.
    """
    _check_sampler(temperature, top_p)
    return _draw(logits_BV, key, np.float32(temperature), np.float32(top_p))


@jax.jit
def _draw(logits_BV, key, temperature, top_p):
    """`sample` for traced settings. Only the branch taken costs: sorting V numbers is a good part of a step."""
    greedy = lambda: jnp.argmax(logits_BV, axis=-1)

    def scaled():
        # the maximum first, or a small temperature overflows
        return (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature

    def everything():
        return jax.random.categorical(key, scaled())

    def nucleus():
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        logits = jnp.take_along_axis(scaled(), order_BV, axis=-1)
        p_BV = jax.nn.softmax(logits)
        before_BV = jnp.pad(jnp.cumsum(p_BV, axis=-1)[:, :-1], ((0, 0), (1, 0)))
        place_B = jax.random.categorical(key, jnp.where(before_BV < top_p, logits, -jnp.inf))
        return jnp.take_along_axis(order_BV, place_B[:, None], axis=-1)[:, 0]

    sampled = lambda: lax.cond(top_p < 1, nucleus, everything)
    return lax.cond(temperature == 0, greedy, sampled).astype(jnp.int32)


def generate(
    model,
    params,
    prompt_ids,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int] | np.ndarray:
    """Tokens that continue a prompt: a list of ids, or [B, max_new_tokens] for an array of B prompts of one length.

    Parameters that are stacked (`scan=True`) are unstacked in each call, which takes their size in memory once more;
    those of `load(path, scan=False)` are used as they are.

    Args:
        prompt_ids: ids in [0, V). An empty prompt is the separator, token 0, after which documents begin.
        temperature, top_p: see `sample`.
        seed: in [0, 2^32). The same seed draws the same tokens, on the same machine and for the same batch size.
    """
    pieces = _pieces(model, params, prompt_ids, DISPATCH, max_new_tokens, temperature, top_p, seed)
    tokens_BT = np.concatenate(list(pieces), axis=1)
    return tokens_BT if np.ndim(prompt_ids) == 2 else tokens_BT[0].tolist()


def stream(
    model,
    params,
    prompt_text: str,
    tokenizer,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The text of `generate`, in pieces as tokens come. A piece never ends within a UTF-8 character.

    Nothing is computed ahead: stop reading at any time.
    """
    _check_tokenizer(tokenizer, model)
    prompt_ids = tokenizer.encode(prompt_text)
    tokens = _pieces(model, params, prompt_ids, 1, max_new_tokens, temperature, top_p, seed)

    def texts():
        text = tokenizers.TextStream(tokenizer)
        for token_BT in tokens:
            yield text.push(token_BT[0, 0])
        yield text.flush()

    return filter(None, texts())


def _pieces(model, params, prompt_ids, piece, max_new_tokens, temperature, top_p, seed) -> Iterator[np.ndarray]:
    """Arguments are checked now; then new tokens [B, piece], the last one perhaps shorter."""
    _check_sampler(temperature, top_p)
    for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
        if not low <= value < 2**32:
            raise ValueError(f"{name} is {value}, expected {low} to 2^32 - 1")
    prompt_BT = _prompt(prompt_ids, model.vocab_size)
    if model.scan:
        model, params = model.clone(scan=False), unstack(params)

    def pieces():
        B, T = prompt_BT.shape
        max_length = -(-(T + max_new_tokens) // CACHE_STEP) * CACHE_STEP
        logits_BV, state = prefill(model, params, prompt_BT, model.init_state(B, max_length))
        key, settings = jax.random.key(seed), (np.float32(temperature), np.float32(top_p))
        for begin in range(0, max_new_tokens, piece):
            end = min(begin + piece, max_new_tokens)
            tokens_BT, logits_BV, state = _decode(model, params, logits_BV, state, key, begin, end, *settings)
            yield np.asarray(tokens_BT)[:, : end - begin]

    return pieces()


def _prompt(prompt_ids, vocab_size) -> np.ndarray:
    prompt = np.asarray(prompt_ids)
    if prompt.ndim not in (1, 2) or len(np.atleast_2d(prompt)) == 0 or (prompt.size and prompt.dtype.kind not in "iu"):
        raise ValueError(f"the prompt is {prompt.dtype} {prompt.shape}, expected ids [T] or [B, T]")
    prompt_BT = np.atleast_2d(prompt)
    if prompt_BT.shape[1] == 0:
        prompt_BT = np.zeros((len(prompt_BT), 1), np.int32)
    if prompt_BT.min() < 0 or prompt_BT.max() >= vocab_size:
        wrong = prompt_BT[(prompt_BT < 0) | (prompt_BT >= vocab_size)][0]
        raise ValueError(f"the prompt holds token {wrong}, expected ids from 0 to {vocab_size - 1}")
    return prompt_BT


def _check_sampler(temperature, top_p):
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 or more, and finite")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")


def _check_tokenizer(tokenizer, model):
    """Bytes decode nothing but bytes; other tokenizers skip ids that a padded vocabulary has beyond theirs."""
    V, vocab_size = model.vocab_size, tokenizer.vocab_size
    if vocab_size > V or (tokenizer.name == "bytes" and vocab_size < V):
        raise ValueError(
            f"tokenizer {tokenizer.name} has {vocab_size} tokens, the model {V}: expected the model's own"
        )
