"""Time a token and bytes of state against context, on a CPU.

RWKV-4 has read that many tokens. The transformer's cache is filled to that length with random keys and values, and has
the size that `generate` gives it. `bytes_read` is the least that a token must read: the state, and the parameters
without the embedding, of which it reads one row. `share_of_read` is its rate over the measured read bandwidth. A cache
that would take more than half of the memory is left out, and listed.
"""

import itertools
import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from experiments.speed.timing import medians
from rwkv_jax import generate, hardware
from rwkv_jax.models import attention

# Half as deep as the 169M model, for which reading 131,072 tokens takes minutes and caching them 10 GB.
FULL = {"num_layers": 6, "dim": 768, "vocab_size": 50277, "dtype": "float32", "tokens": 16, "rounds": 5}
SMOKE = {"num_layers": 2, "dim": 64, "vocab_size": 256, "dtype": "float32", "tokens": 4, "rounds": 1}
CONTEXTS, SMOKE_CONTEXTS = (0, 512, 2048, 8192, 32768, 131072), (0, 64, 512)
MEMORY_SHARE = 0.5  # of the machine's memory, for one cache
CLAIMED = 8192  # tokens of context at which the claim checks that the cached transformer is a fair baseline


def run(smoke: bool) -> dict:
    return {"sweep": sweep(SMOKE, SMOKE_CONTEXTS) if smoke else sweep(FULL, CONTEXTS)}


def report(results: dict) -> list[str]:
    found = results["sweep"]
    lines = [f"reads {found['read_bytes_per_second'] / 1e9:.0f} GB/s"]
    for row in found["rows"]:
        spent = f"{1e3 * row['seconds']:9.2f} ms, state {row['state_bytes'] / 1e6:,.2f} MB"
        share = f"{row['share_of_read']:.0%} of read bandwidth"
        lines.append(f"{row['model']:<12} context {row['context']:>7,}: {spent}, {share}")
    lines += [f"{what}: {share:.2f} (at least {least} wanted)" for what, share, least in found["claims"]]
    return lines + [f"left out: {what}" for what in found["left_out"]]


def sweep(shape: dict, contexts) -> dict:
    """Return the seconds a token and state bytes of both models after each context."""
    fields = {k: shape[k] for k in ("num_layers", "dim", "vocab_size", "dtype")}
    bandwidth = hardware.read_bandwidth()
    rows, left_out = [], []
    for name in ("rwkv4", "transformer"):
        model = rwkv_jax.build(name, scan=False, **fields)
        params = live(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
        least = total_bytes(params) - params["emb"]["embedding"].nbytes
        states = read_states if name == "rwkv4" else cached_states
        for context, state in states(model, params, contexts, shape["tokens"], left_out):
            held = state_bytes(state, context)
            seconds = decode_seconds(model, params, state, context, shape)
            row = {"model": name, "context": context, "seconds": seconds, "state_bytes": held}
            rate = (least + held) / seconds
            rows.append(row | {"bytes_read": least + held, "share_of_read": rate / bandwidth})
    claimed = [row for row in rows if (row["model"], row["context"]) == ("transformer", CLAIMED)]
    what = f"transformer after {CLAIMED:,} tokens: share of read bandwidth"
    claims = [(what, row["share_of_read"], 0.6) for row in claimed]
    found = {"shape": shape, "read_bytes_per_second": bandwidth, "rows": rows, "left_out": left_out}
    return found | {"claims": claims}


def live(params):
    """Return parameters with the initial zeros replaced by noise."""
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(next(noise), x.shape, x.dtype), params)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def greedy(model, params, state, token_B1, count):
    """Decode `count` further tokens; return the last one and the state."""

    def step(_, carry):
        token_B1, state = carry
        logits_B1V, state = model.apply({"params": params}, token_B1, state)
        return logits_B1V.argmax(-1).astype(jnp.int32), state

    return jax.lax.fori_loop(0, count, step, (token_B1, state))


def read_states(model, params, contexts, tokens, left_out):
    """Yield (context, state) of RWKV after each context, continued from the previous one."""
    rng, past, read = np.random.default_rng(0), None, 0
    for context in contexts:
        if context > read:
            new = rng.integers(0, model.vocab_size, (1, context - read)).astype(np.int32)
            past, read = generate.read(model, params, new, past), context
        yield context, jax.tree.map(jnp.copy, past.state) if past else model.init_state(1)


def cached_states(model, params, contexts, tokens, left_out):
    """Yield (context, state) of a transformer whose cache has room for `tokens` more."""
    for context in contexts:
        size = generate.CACHE_STEP * math.ceil((context + tokens) / generate.CACHE_STEP)
        wanted = total_bytes(jax.eval_shape(lambda size=size: model.init_state(1, max_length=size)))
        if wanted > MEMORY_SHARE * memory_bytes():
            left_out.append(f"transformer, context {context:,}: a cache of {wanted / 1e9:.0f} GB")
        else:
            yield context, filled(model.init_state(1, max_length=size))


def decode_seconds(model, params, state, context, shape):
    """Return the seconds a token of decoding `tokens` of them, each time from `context`."""

    def run(token_B1):
        nonlocal state
        _, state = jax.block_until_ready(greedy(model, params, at_context(state, context), token_B1, shape["tokens"]))

    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, model.vocab_size, (1, 1)).astype(np.int32) for _ in itertools.count())
    return medians({"decode": run}, drawn, shape["rounds"])["decode"] / shape["tokens"]


def filled(state):
    """Return a state whose caches hold random keys and values in all slots."""
    noise = jax.jit(lambda x, key: jax.random.normal(key, x.shape, x.dtype), donate_argnums=0)
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(state))))

    def fill(x):
        if not _is_cache(x):
            return x
        return x._replace(k_BHSK=noise(x.k_BHSK, next(keys)), v_BHSK=noise(x.v_BHSK, next(keys)))

    return jax.tree.map(fill, state, is_leaf=_is_cache)


def _is_cache(x):
    return isinstance(x, attention.KVCache)


def at_context(state, context):
    """Return the state with caches filled up to `context`; RWKV's is unchanged."""
    full = lambda cache: cache._replace(length_B=jnp.full_like(cache.length_B, context))
    return tuple(e._replace(cache=full(e.cache)) if hasattr(e, "cache") else e for e in state)


def state_bytes(state, context):
    """Return the bytes that hold the past; of caches, only the filled slots count."""
    held = total_bytes(state)
    for cache in filter(_is_cache, jax.tree.leaves(state, is_leaf=_is_cache)):
        held -= (1 - context / cache.k_BHSK.shape[2]) * total_bytes([cache.k_BHSK, cache.v_BHSK])
    return round(held)


def total_bytes(shapes):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def memory_bytes():
    """Return the memory of the device, or of the machine for a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
