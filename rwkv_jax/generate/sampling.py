"""Samplers: functions `(logits_BV, key_B, history) -> tokens_B`.

`sampler(...)` builds one from the usual settings. It is a pytree and goes through `jax.jit` like an array: its numbers
are traced, so that another temperature compiles nothing; which filters there are is part of its type, and one that is
off costs nothing. Whatever else can be called with these three arguments is a sampler too: wrap it as
`jax.tree_util.Partial(function)` to hand it to a compiled function, which is compiled again for another function.

The settings act in this order, that of transformers, of which the `rwkv` package's is a part:

    logit bias -> repetition, presence and frequency penalties -> bad words      the scores of single tokens
    -> temperature -> top-k -> top-p -> min-p -> typical                         the distribution, each of the last's

With `temperature_last` the temperature comes last and top-p before top-k, as in the `rwkv` package: top-p then is a
share of all tokens, not of those that top-k left. With temperature 0 the best score wins and what is in the second
line does nothing, as with `do_sample=False`.

A row draws with its own key, and depends on nothing but its key, logits and history. A row with no token to draw,
because all are banned or a logit is NaN or +inf, draws -1, for the caller to notice: no other row is affected.

Nothing sorts. Sorting 50,277 logits takes XLA 9 ms on a CPU, as long as many a model takes for the whole token; the
smallest set that reaches a share is found by bisection over the bits of its last member, in 0.3 ms.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

RECENT = 16  # tokens that a history remembers in their order
LANES = 512  # of sums over V: XLA vectorises over them on a CPU, it does not within a sum
NO_TOKEN = 2**31 - 1  # an id beyond every vocabulary
NUMBERS = {  # the least and the largest value, the one that is off, and all that in words
    "top_p": (1e-30, 1, 1, "a number in (0, 1]"),
    "min_p": (0, 1, 0, "a number in [0, 1]"),
    "typical_p": (1e-30, 1, 1, "a number in (0, 1]"),
    "repetition_penalty": (1e-6, 1e6, 1, "a number from 1e-6 to 1e6"),
    "presence_penalty": (-1e6, 1e6, 0, "a number from -1e6 to 1e6"),
    "frequency_penalty": (-1e6, 1e6, 0, "a number from -1e6 to 1e6"),
}
READS = {  # what of a history a setting reads
    "repetition_penalty": "seen_BV",
    "presence_penalty": "counts_BV",
    "frequency_penalty": "counts_BV",
    "bad_words_ids": "recent_BR",
}


class History(NamedTuple):
    """The text as samplers see it. Leaves that a sampler does not read may be None.

    Attributes:
        seen_BV: bool; whether the prompt or the continuation holds the token.
        counts_BV: float32; how often the continuation holds the token, each time less by a factor `decay` for every
            token that followed. Never 0 again.
        recent_BR: int32; the last `RECENT` tokens of prompt and continuation, the newest last, -1 where there is none.
        decay_B: float32.
    """

    seen_BV: jax.Array | None
    counts_BV: jax.Array | None
    recent_BR: jax.Array | None
    decay_B: jax.Array | None

    def add(self, tokens_B) -> "History":
        """The history one token later."""
        seen_BV, counts_BV, recent_BR, decay_B = self
        rows_B = jnp.arange(len(tokens_B))
        if seen_BV is not None:
            seen_BV = seen_BV.at[rows_B, tokens_B].set(True)
        if counts_BV is not None:
            # a presence stays one however long ago it was, also where float32 would become 0
            counts_BV = jnp.where(counts_BV > 0, jnp.maximum(counts_BV * decay_B[:, None], 1e-30), 0)
            counts_BV = counts_BV.at[rows_B, tokens_B].add(1)
        if recent_BR is not None:
            recent_BR = jnp.concatenate([recent_BR[:, 1:], tokens_B[:, None]], axis=1)
        return History(seen_BV, counts_BV, recent_BR, decay_B)


def history(B: int, V: int, prompt_BT=None, valid_BT=None, decay=1.0, sampler=None) -> History:
    """The history after a prompt: arrays on the host, ids in [0, V), where `valid_BT` is true; None is all of it.

    Args:
        decay: of the counts, in [0, 1], one number or [B].
        sampler: leaves that it does not read are None; without one, or with a function of one's own, all are there.
    """
    decay_B = np.broadcast_to(np.asarray(decay, np.float32), B)
    if not np.all((decay_B >= 0) & (decay_B <= 1)):
        raise ValueError(f"the decay of penalties is {decay}, expected 0 to 1")
    seen_BV, recent_BR = np.zeros((B, V), bool), np.full((B, RECENT), -1, np.int32)
    for b in range(B if prompt_BT is not None else 0):
        row = np.asarray(prompt_BT[b], np.int32)  # an empty list is float64 otherwise
        row = row if valid_BT is None else row[np.asarray(valid_BT[b])]
        seen_BV[b, row] = True
        recent_BR[b, RECENT - len(row[-RECENT:]) :] = row[-RECENT:]
    names = {READS[name] for name in sampler.keywords if name in READS} if _ours(sampler) else set(READS.values())
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
    """A sampler of these settings; the module says in which order they act. None is off. Equal tokens: lower ids win.

    Args:
        temperature: divides the logits; 0 is the likeliest token, whatever the key.
        top_p: in (0, 1]. Keeps the smallest set of likeliest tokens whose probability reaches it, the token that
            crosses it included; 1 is off.
        top_k: keeps this many of the likeliest tokens; 0 is off.
        min_p: in [0, 1]. Keeps tokens at least `min_p` times as probable as the likeliest.
        typical_p: in (0, 1]. Keeps the smallest set that reaches this probability of the tokens whose surprise is
            nearest to the entropy, arXiv:2202.00666; 1 is off.
        repetition_penalty: > 0. Divides the positive logits of tokens in prompt and continuation and multiplies the
            negative ones, arXiv:1909.05858; 1 is off.
        presence_penalty, frequency_penalty: are subtracted from the logit of a token in the continuation, the latter
            once for each time that it is there, weighted by the decay of the history.
        logit_bias: is added to the logits of these ids; -inf bans a token.
        bad_words_ids: sequences of 1 to 16 ids that shall not appear: bans the last one where the others precede.
        temperature_last: the `rwkv` package's order.
    """
    given, settings = locals(), {}
    _check("temperature", temperature, temperature == 0 or _within(temperature, 1e-6, 1e6), "0, or from 1e-6 to 1e6")
    for name, (low, high, off, expected) in NUMBERS.items():
        value = given[name]
        _check(name, value, value is None or value == off or _within(value, low, high), expected)
        if value is not None and value != off and (temperature or name in READS):
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
        ids, biases, spare = [*logit_bias], [*logit_bias.values()], _spare(len(logit_bias))
        settings["logit_bias"] = np.int32(ids + [NO_TOKEN] * spare), np.float32(biases + [0] * spare)
    if bad_words_ids:
        for i, word in enumerate(bad_words_ids):
            good = isinstance(word, list | tuple | np.ndarray) and 1 <= len(word) <= RECENT and all(map(_is_id, word))
            _check(f"bad_words_ids[{i}]", word, good, f"1 to {RECENT} ids of tokens")
        words = [[-1] * (RECENT - len(word)) + [*word] for word in bad_words_ids]
        settings["bad_words_ids"] = np.int32(words + [[NO_TOKEN] * RECENT] * _spare(len(words)))
    return Partial(_sampled if temperature else _likeliest, **settings)


def check_vocabulary(sampler, vocab_size: int):
    """An error where a setting names a token that the model does not have: it would have no effect."""
    settings = sampler.keywords if _ours(sampler) else {}
    for name, ids in (
        ("logit_bias", settings.get("logit_bias", [[]])[0]),
        ("bad_words_ids", settings.get("bad_words_ids", [])),
    ):
        wrong = [int(i) for i in np.ravel(ids) if vocab_size <= i < NO_TOKEN]
        if wrong:
            raise ValueError(f"{name} names token {wrong[0]}, expected ids from 0 to {vocab_size - 1}")


def distribution(sampler, logits_BV, history: History | None = None):
    """Logits [B, V] whose softmax a sampler of `sampler(...)` draws from; a row with no token to draw is all NaN."""
    if not _ours(sampler):
        raise ValueError(f"the distribution of {sampler} is not known, expected what sampling.sampler() returns")
    if sampler.func is _sampled:
        return _truncated(_scores(logits_BV, history, sampler.keywords), sampler.keywords)
    token_B1 = sampler(logits_BV, None, history)[:, None]
    one_BV = jnp.where(_ids(logits_BV) == token_B1, 0.0, -jnp.inf)
    return jnp.where(token_B1 < 0, jnp.nan, one_BV)


def draw(logits_BV, key_B):
    """A token [B] from softmax(logits), each row with its key; -1 where that is NaN.

    A block of tokens first, then a token of the block, with two uniform numbers instead of one for each token: an
    inverse distribution function whose resolution is that of both numbers together.
    """
    top_B1 = logits_BV.max(axis=-1, keepdims=True)
    p_BNL = _blocks(jnp.exp(logits_BV - top_B1))
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, 2))(key_B)
    block_B = _inverse(p_BNL.sum(axis=-1), u_B2[:, 0])
    p_BL = jnp.take_along_axis(p_BNL, block_B[:, None, None], axis=1)[:, 0]
    token_B = block_B * LANES + _inverse(p_BL, u_B2[:, 1])
    return jnp.where(jnp.isfinite(top_B1[:, 0]), token_B, -1).astype(jnp.int32)


def _inverse(p_BN, u_B):
    """The first place where the running sum exceeds `u` times the whole; never one with p = 0."""
    sum_BN = jnp.where(p_BN > 0, jnp.cumsum(p_BN, axis=-1), 0)
    return jnp.argmax(sum_BN > (u_B * sum_BN.max(axis=-1))[:, None], axis=-1)


def _sampled(logits_BV, key_B, history=None, **settings):
    return draw(_truncated(_scores(logits_BV, history, settings), settings), key_B)


def _likeliest(logits_BV, key_B, history=None, **settings):
    x_BV = _scores(logits_BV, history, settings)
    top_B1 = x_BV.max(axis=-1, keepdims=True)
    # the first of the best: faster than argmax on a CPU
    token_B = jnp.where(x_BV == top_B1, _ids(x_BV), NO_TOKEN).min(axis=-1)
    return jnp.where(jnp.isfinite(top_B1[:, 0]), token_B, -1)


def _scores(logits_BV, history, settings):
    """What concerns single tokens. A ban, -inf, passes through all that follows it."""
    for name in settings.keys() & READS.keys():
        if getattr(history, READS[name], None) is None:
            raise ValueError(f"{name} needs the history's {READS[name]}, which is None")
    x_BV = jnp.asarray(logits_BV, jnp.float32)
    if "logit_bias" in settings:
        ids_N, bias_N = settings["logit_bias"]
        x_BV = x_BV.at[:, ids_N].add(bias_N[None], mode="drop")
    if "repetition_penalty" in settings:
        penalty = settings["repetition_penalty"]
        x_BV = jnp.where(history.seen_BV, jnp.where(x_BV > 0, x_BV / penalty, x_BV * penalty), x_BV)
    if "presence_penalty" in settings:
        x_BV -= settings["presence_penalty"] * (history.counts_BV > 0)
    if "frequency_penalty" in settings:
        x_BV -= settings["frequency_penalty"] * history.counts_BV
    if "bad_words_ids" in settings:
        before_NR, last_N = settings["bad_words_ids"][:, :-1], settings["bad_words_ids"][:, -1]
        match_BNR = (before_NR[None] == history.recent_BR[:, None, 1:]) | (before_NR[None] == -1)
        x_BV = x_BV.at[:, last_N].min(jnp.where(match_BNR.all(axis=-1), -jnp.inf, jnp.inf), mode="drop")
    return x_BV


def _truncated(x_BV, settings):
    """Logits, the largest 0, that are -inf where a filter removed a token; all NaN where there is none to draw."""
    top_B1 = x_BV.max(axis=-1, keepdims=True)
    z_BV = x_BV - top_B1  # before the temperature, or a small one overflows
    z_BV /= settings.get("temperature", 1)
    for name in ("top_p", "top_k") if "temperature_last" in settings else ("top_k", "top_p"):
        if name in settings:
            weight_BV = jnp.ones_like(z_BV) if name == "top_k" else jnp.exp(z_BV)
            whole_B = 1.0 if name == "top_k" else _sum(weight_BV)
            z_BV = _keep(z_BV, -x_BV, weight_BV, settings[name] * whole_B)
    if "min_p" in settings:
        z_BV = jnp.where(z_BV >= jnp.log(settings["min_p"]), z_BV, -jnp.inf)
    if "typical_p" in settings:
        p_BV = jnp.exp(z_BV)
        whole_B = _sum(p_BV)
        surprise_BV = jnp.log(whole_B)[:, None] - z_BV
        entropy_B = _sum(jnp.where(p_BV > 0, p_BV * surprise_BV, 0)) / whole_B
        z_BV = _keep(z_BV, jnp.abs(surprise_BV - entropy_B[:, None]), p_BV, settings["typical_p"] * whole_B)
        z_BV -= z_BV.max(axis=-1, keepdims=True)
    z_BV /= settings.get("temperature_last", 1)
    return jnp.where(jnp.isfinite(top_B1), z_BV, jnp.nan)


def _keep(z_BV, cost_BV, weight_BV, target_B):
    """`z`, -inf but for the cheapest tokens, as few as reach the target with their weights; lower ids first."""
    bits_BV = lax.bitcast_convert_type(jnp.where(cost_BV == 0, 0.0, cost_BV), jnp.uint32)  # -0 is 0
    key_BV = jnp.where(bits_BV >> 31 == 0, bits_BV | jnp.uint32(1 << 31), ~bits_BV)  # in the order of the costs
    target_B = jnp.broadcast_to(target_B, len(z_BV))
    last_B1, sum_B = _last(key_BV, weight_BV, target_B, 32)
    equal_BV, ids_BV = key_BV == last_B1, _ids(z_BV)

    def up_to_an_id():
        weight_of_equal_BV = jnp.where(equal_BV, weight_BV, 0)
        return _last(ids_BV.astype(jnp.uint32), weight_of_equal_BV, target_B - sum_B, z_BV.shape[1].bit_length())[0]

    several = jnp.any(_sum(equal_BV.astype(jnp.float32)) > 1)
    id_B1 = lax.cond(several, up_to_an_id, lambda: jnp.full_like(last_B1, NO_TOKEN))
    return jnp.where((key_BV < last_B1) | (equal_BV & (ids_BV <= id_B1.astype(jnp.int32))), z_BV, -jnp.inf)


def _last(key_BV, weight_BV, target_B, bits: int):
    """The key [B, 1] with which the running sum in the order of the keys reaches the target, and the sum [B] before.

    Keys are less than 2^bits. It is the largest key of that size if all the weights together do not reach the target.
    """
    key_BNL, weight_BNL = _blocks(key_BV), _blocks(weight_BV)

    def step(i, carry):
        last_B, sum_B = carry
        next_B = last_B | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
        next_sum_B = jnp.where(key_BNL < next_B[:, None, None], weight_BNL, 0).sum(axis=1).sum(axis=-1)
        reached_B = next_sum_B >= target_B
        return jnp.where(reached_B, last_B, next_B), jnp.where(reached_B, sum_B, next_sum_B)

    zero_B = jnp.zeros(len(target_B))
    last_B, sum_B = lax.fori_loop(0, bits, step, (zero_B.astype(jnp.uint32), zero_B))
    return last_B[:, None], sum_B


def _ids(x_BV):
    return lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)


def _blocks(x_BV):
    return jnp.pad(x_BV, ((0, 0), (0, -x_BV.shape[1] % LANES))).reshape(len(x_BV), -1, LANES)


def _sum(x_BV):
    return _blocks(x_BV).sum(axis=1).sum(axis=-1)


def _ours(sampler) -> bool:
    return getattr(sampler, "func", None) in (_sampled, _likeliest)


def _spare(length: int) -> int:
    """Up to the next power of 2, so that lists of many lengths share compiled functions."""
    return (1 << (length - 1).bit_length()) - length


def _within(value, low, high) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high


def _is_id(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < NO_TOKEN


def _check(name, value, good, expected):
    if not good:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
