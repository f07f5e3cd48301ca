"""Samplers: functions `(logits_BV, key_B, history) -> tokens_B`.

`sampler(...)` builds one from the usual settings. It is a pytree: its values are traced, so that another temperature
does not recompile. The set of filters is static, and a filter that is off costs nothing. Any other function of these
three arguments is a sampler too; pass it to a compiled function as `jax.tree_util.Partial(function)`.

The settings act in this order, that of transformers; the `rwkv` package has some of them in the same order:

    logit bias -> repetition, presence and frequency penalties -> bad words      the scores of single tokens
    -> temperature -> top-k -> top-p -> min-p -> typical                         the distribution, each the last one's

With `temperature_last` the temperature comes last and top-p before top-k, as in the `rwkv` package: top-p is then a
share of all tokens. With temperature 0 the best score wins, and the second line is skipped.

A row depends on its own key, logits and history alone. It draws -1 if there is no token to draw: all are banned, or a
logit is NaN or +inf.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rwkv_jax.generate.filters import LANES, NEEDS, blocks, ids, scores, truncated

RECENT = 16  # last tokens that a history holds, in order
NUMBERS = {  # least and largest value, the value that is off, and the range for error messages
    "top_p": (1e-30, 1, 1, "a number in (0, 1]"),
    "min_p": (0, 1, 0, "a number in [0, 1]"),
    "typical_p": (1e-30, 1, 1, "a number in (0, 1]"),
    "repetition_penalty": (1e-6, 1e6, 1, "a number from 1e-6 to 1e6"),
    "presence_penalty": (-1e6, 1e6, 0, "a number from -1e6 to 1e6"),
    "frequency_penalty": (-1e6, 1e6, 0, "a number from -1e6 to 1e6"),
}


class History(NamedTuple):
    """The tokens of prompt and continuation, as samplers need them. Leaves that a sampler does not need may be None.

    Attributes:
        seen_BV: bool; whether the prompt or the continuation holds the token.
        counts_BV: float32; occurrences in the continuation, each times `decay` for every later token; never 0 again.
        recent_BR: int32; the last `RECENT` tokens, the newest last, -1 where there is none.
        decay_B: float32.
    """

    seen_BV: jax.Array | None
    counts_BV: jax.Array | None
    recent_BR: jax.Array | None
    decay_B: jax.Array | None

    def add(self, tokens_B) -> "History":
        """Return the history one token later."""
        seen_BV, counts_BV, recent_BR, decay_B = self
        rows_B = jnp.arange(len(tokens_B))
        if seen_BV is not None:
            seen_BV = seen_BV.at[rows_B, tokens_B].set(True)
        if counts_BV is not None:
            # a decayed count stays positive, for the presence penalty, where float32 would underflow
            counts_BV = jnp.where(counts_BV > 0, jnp.maximum(counts_BV * decay_B[:, None], 1e-30), 0)
            counts_BV = counts_BV.at[rows_B, tokens_B].add(1)
        if recent_BR is not None:
            recent_BR = jnp.concatenate([recent_BR[:, 1:], tokens_B[:, None]], axis=1)
        return History(seen_BV, counts_BV, recent_BR, decay_B)


def history(prompts, V: int, decay=1.0, sampler=None) -> History:
    """Return the history after B prompts.

    Args:
        prompts: arrays or lists of ids in [0, V), of any lengths.
        decay: of the counts, in [0, 1], one number or [B].
        sampler: leaves that it does not need are None; without one, or with a custom function, none is.
    """
    B = len(prompts)
    decay_B = np.broadcast_to(np.asarray(decay, np.float32), B)
    if not np.all((decay_B >= 0) & (decay_B <= 1)):
        raise ValueError(f"the decay of penalties is {decay}, expected 0 to 1")
    seen_BV, recent_BR = np.zeros((B, V), bool), np.full((B, RECENT), -1, np.int32)
    for b, prompt in enumerate(prompts):
        row = np.asarray(prompt, np.int32)  # an empty list is float64 otherwise
        seen_BV[b, row] = True
        recent_BR[b, RECENT - len(row[-RECENT:]) :] = row[-RECENT:]
    names = {NEEDS[name] for name in sampler.keywords if name in NEEDS} if _ours(sampler) else set(NEEDS.values())
    leaves = {"seen_BV": seen_BV, "counts_BV": np.zeros((B, V), np.float32), "recent_BR": recent_BR}
    leaves = {name: jnp.asarray(leaf) if name in names else None for name, leaf in leaves.items()}
    return History(**leaves, decay_B=jnp.asarray(decay_B) if "counts_BV" in names else None)


def sampler(
    temperature: float = 1.0,
    top_p: float | None = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: dict[int, float] | None = None,
    bad_words_ids: list[list[int]] | None = None,
    temperature_last: bool = False,
) -> Partial:
    """Build a sampler; the module's docstring has the order of the settings. None is off. Ties go to lower ids.

    Args:
        temperature: divides the logits; 0 is the likeliest token, whatever the key.
        top_p: in (0, 1]. Keeps the fewest likeliest tokens whose probability reaches it; 1 is off.
        top_k: keeps this many of the likeliest tokens; 0 is off.
        min_p: in [0, 1]. Keeps tokens at least `min_p` times as probable as the likeliest.
        typical_p: in (0, 1]. Keeps the fewest tokens that reach this probability, those whose surprise is nearest to
            the entropy first, arXiv:2202.00666; 1 is off.
        repetition_penalty: > 0. Divides the positive logits of tokens in prompt and continuation and multiplies the
            negative ones, arXiv:1909.05858; 1 is off.
        presence_penalty, frequency_penalty: subtracted from the logit of a token in the continuation, the latter once
            for each occurrence, weighted by the decay of the history.
        logit_bias: added to the logits of these ids; -inf bans a token.
        bad_words_ids: sequences of 1 to 16 ids that must not appear: bans the last one where the others precede.
        temperature_last: the `rwkv` package's order.
    """
    given, settings = locals(), {}
    _check("temperature", temperature, temperature == 0 or _within(temperature, 1e-6, 1e6), "0, or from 1e-6 to 1e6")
    for name, (low, high, off, expected) in NUMBERS.items():
        value = given[name]
        _check(name, value, value is None or value == off or _within(value, low, high), expected)
        if value is not None and value != off and (temperature or name in NEEDS):
            settings[name] = np.float32(value)
    _check("top_k", top_k, top_k is None or _is_id(top_k), "a whole number, 0 or more")
    if temperature:
        settings["temperature_last" if temperature_last else "temperature"] = np.float32(temperature)
    if temperature and top_k:
        settings["top_k"] = np.float32(top_k)
    if logit_bias:
        for token, bias in logit_bias.items():
            _check("an id of logit_bias", token, _is_id(token), "a token's id")
            _check(f"logit_bias[{token}]", bias, bias == -math.inf or _within(bias, -1e6, 1e6), "-1e6 to 1e6, or -inf")
        settings["logit_bias"] = np.int32([*logit_bias]), np.float32([*logit_bias.values()])
    if bad_words_ids:
        for i, word in enumerate(bad_words_ids):
            good = isinstance(word, list | tuple | np.ndarray) and 1 <= len(word) <= RECENT and all(map(_is_id, word))
            _check(f"bad_words_ids[{i}]", word, good, f"1 to {RECENT} ids of tokens")
        settings["bad_words_ids"] = np.int32([[-1] * (RECENT - len(word)) + [*word] for word in bad_words_ids])
    return Partial(_sampled if temperature else _likeliest, **settings)


def check_vocabulary(sampler, vocab_size: int):
    """Raise ValueError where a setting names a token that the model does not have."""
    settings = sampler.keywords if _ours(sampler) else {}
    named = {"logit_bias": settings.get("logit_bias", [[]])[0], "bad_words_ids": settings.get("bad_words_ids", [])}
    for name, tokens in named.items():
        largest = np.max(tokens, initial=0)
        if largest >= vocab_size:
            raise ValueError(f"{name} names token {largest}, expected ids from 0 to {vocab_size - 1}")


def draw(logits_BV, key_B):
    """Draw a token [B] from softmax(logits), each row with its key; -1 where the softmax is NaN.

    Inverts the distribution function in two stages, first the block and then the token, each with its own uniform
    number: two numbers instead of V, with the resolution of both together.
    """
    top_B1 = logits_BV.max(axis=-1, keepdims=True)
    p_BNL = blocks(jnp.exp(logits_BV - top_B1))
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, 2))(key_B)
    block_B = _inverse(p_BNL.sum(axis=-1), u_B2[:, 0])
    p_BL = jnp.take_along_axis(p_BNL, block_B[:, None, None], axis=1)[:, 0]
    token_B = block_B * LANES + _inverse(p_BL, u_B2[:, 1])
    return jnp.where(jnp.isfinite(top_B1[:, 0]), token_B, -1).astype(jnp.int32)


def _inverse(p_BN, u_B):
    """Return the first index where the running sum exceeds `u` times the total; never one with p = 0."""
    # a parallel running sum is not monotonic: rounding alone may make it grow where p = 0
    sum_BN = jnp.where(p_BN > 0, jnp.cumsum(p_BN, axis=-1), 0)
    return jnp.argmax(sum_BN > (u_B * sum_BN.max(axis=-1))[:, None], axis=-1)


def _sampled(logits_BV, key_B, history=None, **settings):
    return draw(truncated(scores(logits_BV, history, settings), settings), key_B)


def _likeliest(logits_BV, key_B, history=None, **settings):
    x_BV = scores(logits_BV, history, settings)
    top_B1 = x_BV.max(axis=-1, keepdims=True)
    # the lowest id of the best; faster than argmax on a CPU
    token_B = jnp.where(x_BV == top_B1, ids(x_BV), x_BV.shape[1]).min(axis=-1)
    return jnp.where(jnp.isfinite(top_B1[:, 0]), token_B, -1)


def _ours(sampler) -> bool:
    return getattr(sampler, "func", None) in (_sampled, _likeliest)


def _within(value, low, high) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high


def _is_id(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < 2**31


def _check(name, value, good, expected):
    if not good:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
