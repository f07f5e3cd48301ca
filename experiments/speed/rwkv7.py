"""RWKV-7 on a CPU: its operator and RWKV-6's, a training step, and generation, against other implementations.

Our training steps rematerialise everything between matrix products (`remat="matmuls"`); the peer runs with its
defaults. Operators run on random inputs as their model makes them; the forward pass is timed alone and with the
backward pass. FLOPs of a training step are those of `hardware.flops_per_token`, for jax-linear-attention's model those
of ours. Shares are of the machine's matmul peak.
"""

import importlib.util
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from experiments.speed import generation, train
from experiments.speed.decode import live
from experiments.speed.timing import medians, ratio
from rwkv_jax import hardware
from rwkv_jax.ops import wkv6, wkv7

FULL = {
    "operator": {"B": 4, "T": 1024, "H": 8, "K": 64},
    "training": {
        "num_layers": 6,
        "dim": 512,
        "vocab_size": 256,
        "dtype": "float32",
        "remat": "matmuls",
        "batch": 4,
        "seq_len": 512,
    },
    "generation": {
        "fields": {"num_layers": 12, "dim": 768, "vocab_size": 65536},
        "tokens": 64,
        "prompt": 512,
        "rounds": 5,
    },
    "contexts": {  # a quarter as deep: reading 131,072 tokens takes minutes
        "fields": {"num_layers": 3, "dim": 768, "vocab_size": 65536},
        "tokens": 64,
        "context": 131072,
        "rounds": 5,
    },
    "rounds": 7,
}
SMOKE = {
    "operator": {"B": 1, "T": 32, "H": 2, "K": 8},
    "training": {
        "num_layers": 2,
        "dim": 64,
        "vocab_size": 256,
        "dtype": "float32",
        "remat": "matmuls",
        "batch": 2,
        "seq_len": 32,
    },
    "generation": {
        "fields": {"num_layers": 2, "dim": 64, "vocab_size": 256},
        "tokens": 4,
        "prompt": 64,
        "rounds": 1,
    },
    "contexts": {"fields": {"num_layers": 2, "dim": 64, "vocab_size": 256}, "tokens": 4, "context": 600, "rounds": 1},
    "rounds": 1,
}
PLAIN = "plain scan, autodiff"
PEER = "jax-linear-attention"


def run(smoke: bool) -> dict:
    shape = SMOKE if smoke else FULL
    results = {"shape": shape, "operators": operators(shape["operator"], shape["rounds"])}
    results |= training(shape["training"], shape["rounds"])
    model, params = drawn("rwkv7", shape["contexts"]["fields"])
    results["contexts"] = generation.after_contexts(model, params, shape["contexts"])
    if importlib.util.find_spec("rwkv"):
        os.environ["RWKV_V7_ON"] = "1"
        model, params = drawn("rwkv7", shape["generation"]["fields"])
        results["rows"] += generation.beside_the_package(model, params, shape["generation"], (1.5, 1.5))
    return results


def report(results: dict) -> list[str]:
    lines = []
    for row in results["operators"]:
        spent = f"forward {1e3 * row['forward']:.1f} ms, both {1e3 * row['both']:.1f} ms"
        lines.append(
            f"{row['operator']} {row['form']}: {spent}, {row['temporary_bytes'] / 2**20:.0f} MiB of temporaries"
        )
    for name, row in results["models"].items():
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['flops_per_token'] / 1e6:.0f} MFLOP a token"
        memory = f"{row['temporary_bytes'] / 1e9:.2f} GB of temporaries"
        lines.append(f"{name}: {speed}, {row['share_of_peak']:.0%} of the peak, {memory}")
    for row in results["contexts"]:
        line = f"after {row['context']:>7,} tokens: {1e3 * row['seconds']:.2f} ms a token, "
        lines.append(line + f"state {row['state_bytes']:,} bytes, peak memory {row['peak_bytes'] / 1e9:.3f} GB")
    return lines


def operators(shape: dict, rounds: int) -> list[dict]:
    """Return the seconds of each form of both operators, forward and both passes, and the latter's temporaries."""
    rows = []
    for name, op, plain in (("wkv6", wkv6, plain_wkv6), ("wkv7", wkv7, plain_wkv7)):
        forms = {form: lambda *x, op=op, form=form: op(*x, impl=form) for form in ("scan", "chunked")}
        sides, temporaries = {}, {}
        draw = lambda seed, name=name: jax.block_until_ready(operands(name, seed, **shape))
        for form, f in (forms | {PLAIN: plain}).items():
            grads = jax.grad(lambda x, f=f: sum((z * z).sum() for z in f(*x)))
            programs = {"forward": lambda x, f=f: f(*x), "both": grads}
            programs = {which: jax.jit(g).lower(draw(0)).compile() for which, g in programs.items()}
            temporaries[form] = programs["both"].memory_analysis().temp_size_in_bytes
            for which, program in programs.items():
                sides[form, which] = lambda x, program=program: jax.block_until_ready(program(x))
        seconds = medians(sides, map(draw, itertools.count()), rounds)
        for form, size in temporaries.items():
            times = {which: seconds[form, which] for which in ("forward", "both")}
            faster = {"times_the_plain_scan": seconds[PLAIN, "both"] / times["both"], "temporary_bytes": size}
            rows.append({"operator": name, "form": form} | times | faster)
    return rows


def operands(name, seed, B, T, H, K):
    """Return the operands and an empty state, as the models make them."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    normal = lambda: jax.random.normal(next(keys), (B, T, H, K))
    r, k, v, w = (normal() for _ in range(4))
    state = jnp.zeros((B, H, K, K))
    if name == "wkv6":
        return r, -jnp.exp(w - 1), k, v, jnp.ones((H, K)), state
    kappa = normal()
    kappa /= jnp.linalg.norm(kappa, axis=-1, keepdims=True)
    return r, -jnp.exp(-0.5) * jax.nn.sigmoid(w), k, v, -kappa, kappa * jax.nn.sigmoid(normal()), state


def plain_wkv6(r, w, k, v, u_HK, state):
    """The recurrence as one scan over time, for JAX to differentiate: the straightforward implementation."""

    def step(state, token):
        r, w, k, v = token
        write = k[..., None] * v[..., None, :]
        y = jnp.einsum("bhk,bhkv->bhv", r, state + u_HK[None, ..., None] * write)
        return jnp.exp(w)[..., None] * state + write, y

    state, y = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (r, w, k, v)))
    return y.swapaxes(0, 1), state


def plain_wkv7(r, w, k, v, a, b, state):
    def step(state, token):
        r, w, k, v, a, b = token
        found = jnp.einsum("bhk,bhkv->bhv", a, state)
        state = jnp.exp(w)[..., None] * state + b[..., None] * found[..., None, :] + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", r, state)

    state, y = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (r, w, k, v, a, b)))
    return y.swapaxes(0, 1), state


def training(shape: dict, rounds: int) -> dict:
    """Return {"rows": speeds against others', "models": speed, FLOPs, share of the peak and temporaries of a step}."""
    models = {name: train.build(name, shape).clone(remat=shape["remat"]) for name in ("rwkv7", "rwkv4", "transformer")}
    steps, temporaries = {}, {}
    for name, model in models.items():
        steps[name], temporaries[name] = train.whole_step(model, shape)
    if importlib.util.find_spec("jla"):
        steps[PEER], temporaries[PEER] = peer_step(shape)
    rng, size = np.random.default_rng(0), (shape["batch"], shape["seq_len"] + 1)
    tokens = (rng.integers(0, shape["vocab_size"], size).astype(np.int32) for _ in itertools.count())
    seconds = medians(steps, tokens, rounds)
    speed = {name: shape["batch"] * shape["seq_len"] / t for name, t in seconds.items()}
    wanted = {"rwkv4": None, "transformer": None, PEER: 1.8}
    others = [name for name in wanted if name in speed]
    rows = [ratio("training, tokens/s", "rwkv7", speed["rwkv7"], name, speed[name], wanted[name]) for name in others]
    peak, measured = hardware.matmul_peak(), {}
    for name in speed:
        flops = hardware.flops_per_token(models.get(name, models["rwkv7"]), shape["seq_len"])
        measured[name] = {
            "tokens_per_second": speed[name],
            "flops_per_token": flops,
            "share_of_peak": speed[name] * flops / peak,
            "temporary_bytes": temporaries[name],
        }
    return {"rows": rows, "peak_flops": peak, "models": measured}


def peer_step(shape: dict):
    """Return a step of jax-linear-attention's RWKV-7 (forward, backward, clip, AdamW) and its bytes of temporaries."""
    import equinox
    import optax
    from jla.models.rwkv7 import RWKV7LM, RWKV7Config

    config = RWKV7Config(shape["vocab_size"], shape["dim"], shape["num_layers"], compute_dtype="float32")
    model = RWKV7LM(config, key=jax.random.key(0))
    weights, rest = equinox.partition(model, equinox.is_array)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, 0.9, 0.99))

    def step(weights, opt_state, tokens_BT):
        def loss(weights):
            logits = equinox.combine(weights, rest)(tokens_BT[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(weights)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, value

    carry = weights, tx.init(weights)
    tokens_BT = np.zeros((shape["batch"], shape["seq_len"] + 1), np.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, tokens_BT).compile()

    def run(tokens_BT):
        nonlocal carry
        *carry, _ = jax.block_until_ready(compiled(*carry, tokens_BT))

    return run, compiled.memory_analysis().temp_size_in_bytes


def drawn(name, fields):
    """Return (model, params) with layers in a tuple and no parameter zero."""
    model = rwkv_jax.build(name, scan=False, **fields)
    return model, live(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
