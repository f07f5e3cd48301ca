"""The filters of a sampler, as functions of logits; the docstring of `sampling` has their order.

No filter sorts: XLA sorts 50,277 logits in 9 ms on a CPU, as long as a small model takes for the whole token.
Bisection over the bits of the threshold finds the smallest set that reaches a share in 0.4 ms. If tokens tie at the
threshold, a second bisection over their ids follows.
"""

import jax.numpy as jnp
from jax import lax

LANES = 512  # partial sums over V: on a CPU, XLA vectorises over these, but not within a sum
NEEDS = {  # the leaf of the history that a setting needs
    "repetition_penalty": "seen_BV",
    "presence_penalty": "counts_BV",
    "frequency_penalty": "counts_BV",
    "bad_words_ids": "recent_BR",
}


def scores(logits_BV, history, settings):
    """Apply bias, penalties and bans to the logits. A ban, -inf, passes through all later filters."""
    for name in settings.keys() & NEEDS.keys():
        if getattr(history, NEEDS[name], None) is None:
            raise ValueError(f"{name} needs the history's {NEEDS[name]}, which is None")
    x_BV = jnp.asarray(logits_BV, jnp.float32)
    if "logit_bias" in settings:
        ids_N, bias_N = settings["logit_bias"]
        x_BV = x_BV.at[:, ids_N].add(bias_N[None])
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
        x_BV = x_BV.at[:, last_N].min(jnp.where(match_BNR.all(axis=-1), -jnp.inf, jnp.inf))
    return x_BV


def truncated(x_BV, settings):
    """Apply the temperature and the filters of the distribution.

    Returns:
        logits, shifted so that the largest is 0: -inf where a filter removed a token. None is finite if no token can
        be drawn.
    """
    z_BV = x_BV - x_BV.max(axis=-1, keepdims=True)  # before the temperature, or a small one overflows
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
    return z_BV / settings.get("temperature_last", 1)


def _keep(z_BV, cost_BV, weight_BV, target_B):
    """Keep `z` of the cheapest tokens, as few as reach the target with their weights, and set the others to -inf.

    Ties go to the lower ids.
    """
    bits_BV = lax.bitcast_convert_type(jnp.where(cost_BV == 0, 0.0, cost_BV), jnp.uint32)  # -0 is 0
    key_BV = jnp.where(bits_BV >> 31 == 0, bits_BV | jnp.uint32(1 << 31), ~bits_BV)  # ordered as the costs
    target_B = jnp.broadcast_to(target_B, len(z_BV))
    last_B1, sum_B = _last(key_BV, weight_BV, target_B, 32)
    equal_BV, ids_BV = key_BV == last_B1, ids(z_BV)

    def up_to_an_id():
        weight_of_equal_BV = jnp.where(equal_BV, weight_BV, 0)
        return _last(ids_BV.astype(jnp.uint32), weight_of_equal_BV, target_B - sum_B, z_BV.shape[1].bit_length())[0]

    several = jnp.any(_sum(equal_BV.astype(jnp.float32)) > 1)
    id_B1 = lax.cond(several, up_to_an_id, lambda: jnp.full_like(last_B1, z_BV.shape[1]))
    return jnp.where((key_BV < last_B1) | (equal_BV & (ids_BV <= id_B1.astype(jnp.int32))), z_BV, -jnp.inf)


def _last(key_BV, weight_BV, target_B, bits: int):
    """Return the key [B, 1] at which the running sum of weights, by increasing key, reaches the target.

    Also returns the sum [B] before it. Keys are less than 2^bits; where all weights together do not reach the target,
    the largest such key is returned.
    """
    key_BNL, weight_BNL = blocks(key_BV), blocks(weight_BV)

    def step(i, carry):
        last_B, sum_B = carry
        next_B = last_B | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
        next_sum_B = jnp.where(key_BNL < next_B[:, None, None], weight_BNL, 0).sum(axis=1).sum(axis=-1)
        reached_B = next_sum_B >= target_B
        return jnp.where(reached_B, last_B, next_B), jnp.where(reached_B, sum_B, next_sum_B)

    zero_B = jnp.zeros(len(target_B))
    last_B, sum_B = lax.fori_loop(0, bits, step, (zero_B.astype(jnp.uint32), zero_B))
    return last_B[:, None], sum_B


def ids(x_BV):
    return lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)


def blocks(x_BV):
    return jnp.pad(x_BV, ((0, 0), (0, -x_BV.shape[1] % LANES))).reshape(len(x_BV), -1, LANES)


def _sum(x_BV):
    return blocks(x_BV).sum(axis=1).sum(axis=-1)
