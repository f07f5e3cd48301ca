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
        row = np.asarray(prompt_BT[b])
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
    traced = {}
    _check("temperature", temperature, temperature == 0 or _within(temperature, 1e-6, 1e6), "0, or from 1e-6 to 1e6")
    if temperature != 0:
        traced["temperature_last" if temperature_last else "temperature"] = np.float32(temperature)
        for name, value, off in (("top_p", top_p, 1), ("min_p", min_p, 0), ("typical_p", typical_p, 1)):
            interval = "[0, 1]" if off == 0 else "(0, 1]"
            _check(name, value, value is None or value == off or _within(value, 1e-30, 1), f"a number in {interval}")
            if value is not None and value != off:
                traced[name] = np.float32(value)
        _check("top_k", top_k, top_k is None or _is_id(top_k), "a whole number, 0 or more")
        if top_k:
            traced["top_k"] = np.float32(top_k)
    penalties = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
    for name, value, off in (
        ("repetition_penalty", repetition_penalty, 1),
        *((*item, 0) for item in penalties.items()),
    ):
        low, expected = (1e-6, "a number from 1e-6 to 1e6") if off == 1 else (-1e6, "a number from -1e6 to 1e6")
        _check(name, value, value is None or _within(value, low, 1e6), expected)
        if value is not None and value != off:
            traced[name] = np.float32(value)
    if logit_bias:
        for token, bias in logit_bias.items():
            _check("an id of logit_bias", token, _is_id(token), "a token's id")
            _check(f"logit_bias[{token}]", bias, bias == -math.inf or _within(bias, -1e6, 1e6), "-1e6 to 1e6, or -inf")
        empty = _spare(len(logit_bias))
        traced["logit_bias"] = (
            np.array([*logit_bias, *[NO_TOKEN] * empty], np.int32),
            np.array([*logit_bias.values(), *[0] * empty], np.float32),
        )
    if bad_words_ids:
        for i, word in enumerate(bad_words_ids):
            good = isinstance(word, list | tuple | np.ndarray) and 1 <= len(word) <= RECENT and all(map(_is_id, word))
            _check(f"bad_words_ids[{i}]", word, good, f"1 to {RECENT} ids of tokens")
        rows = [[-1] * (RECENT - len(word)) + [int(i) for i in word] for word in bad_words_ids]
        traced["bad_words_ids"] = np.array(rows + [[NO_TOKEN] * RECENT] * _spare(len(rows)), np.int32)
    return Partial(_sampled if temperature else _likeliest, **traced)


def check_vocabulary(sampler, vocab_size: int):
    """An error where settings name a token that the model does not have, which would have no effect."""
    keywords = sampler.keywords if _ours(sampler) else {}
    for name, ids in (
        ("logit_bias", keywords.get("logit_bias", [[]])[0]),
        ("bad_words_ids", keywords.get("bad_words_ids", [])),
    ):
        wrong = [i for i in np.ravel(ids) if vocab_size <= i < NO_TOKEN]
        if wrong:
            raise ValueError(f"{name} names token {wrong[0]:.0f}, expected ids from 0 to {vocab_size - 1}")


def distribution(sampler, logits_BV, history: History | None = None):
    """Logits [B, V] whose softmax a sampler of `sampler(...)` draws from; a row with no token to draw is all NaN."""
    if not _ours(sampler):
        raise ValueError(f"the distribution of {sampler} is not known, expected what sampling.sampler() returns")
    if sampler.func is _sampled:
        return _truncated(_scores(logits_BV, history, **sampler.keywords), **sampler.keywords)
    token_B = sampler(logits_BV, None, history)
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1])[None] == token_B[:, None], 0.0, -jnp.inf)
    return jnp.where(token_B[:, None] < 0, jnp.nan, logits_BV)


def draw(logits_BV, key_B):
    """A token [B] from softmax(logits), each row with its key; -1 where that is NaN.

    A block of tokens first, then a token of the block, with two uniform numbers instead of one for each token: an
    inverse distribution function whose resolution is that of both numbers together.
    """
    B, V = logits_BV.shape
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
    return draw(_truncated(_scores(logits_BV, history, **settings), **settings), key_B)


def _likeliest(logits_BV, key_B, history=None, **settings):
    scores_BV = _scores(logits_BV, history, **settings)
    ids_BV = jnp.broadcast_to(jnp.arange(scores_BV.shape[1], dtype=jnp.int32), scores_BV.shape)
    top_B1 = scores_BV.max(axis=-1, keepdims=True)
    # the first of the best, four times as fast as argmax on a CPU
    token_B = jnp.where(scores_BV == top_B1, ids_BV, NO_TOKEN).min(axis=-1)
    return jnp.where(jnp.isfinite(top_B1[:, 0]), token_B, -1)


def _scores(
    logits_BV,
    history,
    logit_bias=None,
    repetition_penalty=None,
    presence_penalty=None,
    frequency_penalty=None,
    bad_words_ids=None,
    **_,
):
    """What concerns single tokens. A ban, -inf, passes through all that follows it."""
    for name, setting in locals().copy().items():
        if name in READS and setting is not None and getattr(history, READS[name], None) is None:
            raise ValueError(f"{name} needs {READS[name]} of a history, which is None")
    x_BV = logits_BV.astype(jnp.float32)
    if logit_bias is not None:
        ids_N, bias_N = logit_bias
        x_BV = x_BV.at[:, ids_N].add(bias_N[None], mode="drop")
    if repetition_penalty is not None:
        penalised_BV = jnp.where(x_BV > 0, x_BV / repetition_penalty, x_BV * repetition_penalty)
        x_BV = jnp.where(history.seen_BV, penalised_BV, x_BV)
    if presence_penalty is not None:
        x_BV -= presence_penalty * (history.counts_BV > 0)
    if frequency_penalty is not None:
        x_BV -= frequency_penalty * history.counts_BV
    if bad_words_ids is not None:
        before_NR, last_N = bad_words_ids[:, :-1], bad_words_ids[:, -1]
        match_BNR = (before_NR[None] == history.recent_BR[:, None, 1:]) | (before_NR[None] == -1)
        x_BV = x_BV.at[:, last_N].min(jnp.where(match_BNR.all(axis=-1), -jnp.inf, jnp.inf), mode="drop")
    return x_BV


def _truncated(x_BV, temperature=None, temperature_last=None, top_k=None, top_p=None, min_p=None, typical_p=None, **_):
    """Logits, the largest 0, that are -inf where a filter removed a token."""
    top_B1 = x_BV.max(axis=-1, keepdims=True)
    z_BV = x_BV - top_B1  # before the temperature, or a small one overflows
    if temperature is not None:
        z_BV /= temperature

    def keep_k(z_BV):
        return _keep(z_BV, -x_BV, jnp.ones_like(z_BV), top_k)

    def keep_p(z_BV):
        p_BV = jnp.exp(z_BV)
        return _keep(z_BV, -x_BV, p_BV, top_p * _sum(p_BV))

    first, second = ((keep_k, top_k), (keep_p, top_p))[:: 1 if temperature_last is None else -1]
    for keep, setting in (first, second):
        if setting is not None:
            z_BV = keep(z_BV)
    if min_p is not None:
        z_BV = jnp.where(z_BV >= jnp.log(min_p), z_BV, -jnp.inf)
    if typical_p is not None:
        p_BV = jnp.exp(z_BV)
        total_B = _sum(p_BV)
        surprise_BV = jnp.log(total_B)[:, None] - z_BV
        entropy_B = _sum(jnp.where(p_BV > 0, p_BV * surprise_BV, 0)) / total_B
        z_BV = _keep(z_BV, jnp.abs(surprise_BV - entropy_B[:, None]), p_BV, typical_p * total_B)
        if temperature_last is None:
            z_BV -= z_BV.max(axis=-1, keepdims=True)
    if temperature_last is not None:
        z_BV = (z_BV - z_BV.max(axis=-1, keepdims=True)) / temperature_last
    return jnp.where(jnp.isfinite(top_B1), z_BV, jnp.nan)


def _keep(z_BV, cost_BV, weight_BV, target_B):
    """`z`, -inf but for the cheapest tokens, as few as reach the target with their weights; of equal ones lower ids."""
    B, V = z_BV.shape
    bits_BV = lax.bitcast_convert_type(jnp.where(cost_BV == 0, 0.0, cost_BV), jnp.uint32)  # -0 is 0
    key_BV = jnp.where(bits_BV >> 31 == 0, bits_BV | jnp.uint32(1 << 31), ~bits_BV)  # in the order of the costs
    target_B = jnp.broadcast_to(target_B, B)
    last_B1, sum_B = _last(key_BV, weight_BV, target_B, 32)
    equal_BV = key_BV == last_B1
    ids_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.uint32), (B, V))

    def up_to_an_id():
        return _last(ids_BV, jnp.where(equal_BV, weight_BV, 0), target_B - sum_B, V.bit_length())[0]

    several = jnp.any(_sum(equal_BV.astype(jnp.float32)) > 1)
    id_B1 = lax.cond(several, up_to_an_id, lambda: jnp.full((B, 1), V, jnp.uint32))
    return jnp.where((key_BV < last_B1) | (equal_BV & (ids_BV <= id_B1)), z_BV, -jnp.inf)


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


def _blocks(x_BV):
    B, V = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -V % LANES))).reshape(B, -1, LANES)


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
