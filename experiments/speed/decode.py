"""Time a token and bytes of state against context.

RWKV-4 after really reading that many tokens, the transformer with a cache of random keys and values
already filled so far, and the transformer without a cache, which computes the whole text again for each token. Caches
have the size that `generate` gives them. `bytes_read` is the least that a token must read: parameters without the
embedding, of which it takes a row, and the state; its rate over the measured read bandwidth says how far from the
machine's limit a side is. What would take too long or too much memory is left out, and listed.
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

# On a CPU half as deep as the 169M model, for which reading 131,072 tokens takes minutes and caching them 10 GB.
CPU = {"num_layers": 6, "dim": 768, "vocab_size": 50277, "dtype": "float32", "tokens": 16, "rounds": 5}
ACCELERATOR = CPU | {"num_layers": 12, "dtype": "bfloat16"}
SMOKE = {"num_layers": 2, "dim": 64, "vocab_size": 256, "dtype": "float32", "tokens": 4, "rounds": 1}
CONTEXTS = (0, 512, 2048, 8192, 32768, 131072)
BATCHES = {"cpu": (1,), "other": (1, 8, 32)}
LONGEST_SECONDS = 10  # a token without a cache
FEW = 256  # tokens of a pass that cost little beside reading the parameters
MEMORY_SHARE = 0.5  # of the machine's, for one cache
CLAIMED = 8192  # tokens of context after which the cached transformer must be no straw man


def run(smoke):
    on_cpu = jax.default_backend() == "cpu"
    shape = SMOKE if smoke else CPU if on_cpu else ACCELERATOR
    contexts = (0, 64, 512) if smoke else CONTEXTS
    return {"sweep": sweep(shape, contexts, BATCHES["cpu" if on_cpu else "other"])}


def report(results):
    """What was measured, a line each."""
    found = results["sweep"]
    bandwidth = found["read_bytes_per_second"]
    lines = [f"reads {bandwidth / 1e9:.0f} GB/s"]
    for row in found["rows"]:
        line = f"{row['model']:<22} batch {row['batch']} context {row['context']:>7,}: {1e3 * row['seconds']:9.2f} ms"
        if "share_of_read" in row:
            line += f", state {row['state_bytes'] / 1e6:,.2f} MB, {row['share_of_read']:.0%} of read bandwidth"
        lines.append(line)
    for what, share, least in found["claims"]:
        lines.append(f"{what}: {share:.2f} (at least {least} wanted)")
    return lines + [f"left out: {what}" for what in found["left_out"]]


# --------------------------------------------------------------------------------------- against context


def sweep(shape, contexts, batches):
    """Seconds a token and state bytes of all models, batches and contexts."""
    fields = {k: shape[k] for k in ("num_layers", "dim", "vocab_size", "dtype")}
    models = {name: rwkv_jax.build(name, **fields) for name in ("rwkv4", "transformer")}
    bandwidth = hardware.read_bandwidth()
    found = {"shape": shape, "read_bytes_per_second": bandwidth, "rows": [], "left_out": []}
    for name, model in models.items():
        params = live(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
        least = sum(x.nbytes for x in jax.tree.leaves(params)) - params["emb"]["embedding"].nbytes
        flat, layers = model.clone(scan=False), rwkv_jax.unstack(params)
        for batch in batches:
            sides = with_state(flat, layers, shape, contexts, batch, found["left_out"])
            if name == "transformer":
                sides = itertools.chain(sides, without_cache(model, params, contexts, batch, found["left_out"]))
            for side, context, seconds, kept in sides:
                row = {"model": side, "batch": batch, "context": context, "seconds": seconds}
                if kept is not None:
                    read = least + kept
                    row |= {"state_bytes": kept, "bytes_read": read, "share_of_read": read / seconds / bandwidth}
                found["rows"].append(row)
    claimed = [r for r in found["rows"] if (r["model"], r["batch"], r["context"]) == ("transformer", 1, CLAIMED)]
    what = f"transformer after {CLAIMED:,} tokens: share of read bandwidth"
    return found | {"claims": [(what, r["share_of_read"], 0.6) for r in claimed]}


def live(params):
    """Parameters without the zeros of the start."""
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(next(noise), x.shape, x.dtype), params)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def greedy(model, params, state, token_B1, count):
    """`count` further tokens: the last one and the state."""

    def step(_, carry):
        token_B1, state = carry
        logits_B1V, state = model.apply({"params": params}, token_B1, state)
        return logits_B1V.argmax(-1).astype(jnp.int32), state

    return jax.lax.fori_loop(0, count, step, (token_B1, state))


def with_state(model, params, shape, contexts, batch, left_out):
    """(model, context, seconds a token, state bytes) of decoding from a state that holds each context."""
    name = "rwkv4" if model.layers == ("rwkv4",) else "transformer"
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(0, model.vocab_size, (batch, count)).astype(np.int32)
    past, read = None, 0
    for context in contexts:
        if name == "rwkv4":
            if context > read:
                past = generate.read(model, params, draw(context - read), past)
            read = context
            given = jax.tree.map(jnp.copy, past.state) if past else model.init_state(batch)
        else:
            size = generate.CACHE_STEP * math.ceil((context + shape["tokens"]) / generate.CACHE_STEP)
            wanted = total_bytes(jax.eval_shape(lambda size=size: model.init_state(batch, max_length=size)))
            if wanted > MEMORY_SHARE * memory_bytes():
                left_out.append(f"transformer, batch {batch}, context {context:,}: a cache of {wanted / 1e9:.0f} GB")
                continue
            given = filled(model.init_state(batch, max_length=size))
        used = state_bytes(given, context)
        side = {name: decoder(model, params, given, context, shape["tokens"])}
        del given
        tokens = (draw(1) for _ in itertools.count())
        seconds = medians(side, tokens, shape["rounds"])[name]
        yield name, context, seconds / shape["tokens"], used


def decoder(model, params, state, context, count):
    """A function of a token [B, 1] that decodes `count` more after `context`, each time from there."""

    def run(token_B1):
        nonlocal state
        _, state = jax.block_until_ready(greedy(model, params, at_context(state, context), token_B1, count))

    return run


def filled(state):
    """A state whose caches hold random keys and values in all slots."""
    noise = jax.jit(lambda x, key: jax.random.normal(key, x.shape, x.dtype), donate_argnums=0)
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(state))))
    return jax.tree.map(lambda x: noise(x, next(keys)) if x.ndim == 4 else x, state)


def at_context(state, context):
    """The state with caches filled up to `context`; RWKV's as it is."""
    full = lambda cache: cache._replace(length_B=jnp.full_like(cache.length_B, context))
    return tuple(e._replace(cache=full(e.cache)) if hasattr(e, "cache") else e for e in state)


def state_bytes(state, context):
    """Bytes that hold the past: of caches the filled slots."""
    share = lambda x: context / x.shape[2] if x.ndim == 4 else 1
    return round(sum(share(x) * x.nbytes for x in jax.tree.leaves(state)))


def total_bytes(shapes):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def memory_bytes():
    """Memory of the device, or of the machine for a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def without_cache(model, params, contexts, batch, left_out):
    """(model, context, seconds a token, None) of computing each context and a token more from the start."""

    @jax.jit
    def last(params, tokens_BT):
        x_BTD, _ = model.apply({"params": params}, tokens_BT, method="hidden")
        return model.apply({"params": params}, x_BTD[:, -1], method="logits").argmax(-1)

    name, rng, before = "transformer, no cache", np.random.default_rng(0), None
    for context in contexts:
        if before and before[1] * (context + FEW) / (before[0] + FEW) > LONGEST_SECONDS:
            left_out.append(f"{name}, batch {batch}, context {context:,}: more than {LONGEST_SECONDS} s a token")
            continue
        draw = lambda size=(batch, context + 1): rng.integers(0, model.vocab_size, size).astype(np.int32)
        side = {name: lambda tokens_BT: jax.block_until_ready(last(params, tokens_BT))}
        before = context, medians(side, (draw() for _ in itertools.count()), 3)[name]
        yield name, *before, None
