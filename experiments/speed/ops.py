"""Every form of WKV-4 over lengths, sizes and dtypes: time, memory, compile time, and the share of the roofline, which
is the time that copying the least number of bytes takes. Plain autodiff through a scan and transformers' own loop
run beside."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.timing import medians
from rwkv_jax import hardware
from rwkv_jax.ops import wkv4

CLAIMED = (4, 1024, 512, "float32")
SHAPES = (
    CLAIMED,
    (4, 1024, 512, "bfloat16"),
    (1, 1024, 128, "float32"),
    (4, 128, 512, "float32"),
    (16, 256, 128, "float32"),
    (4, 8192, 512, "float32"),
    (1, 32768, 512, "float32"),
    (1, 131072, 512, "float32"),
)
SMOKE_SHAPES = ((2, 64, 32, "float32"), (1, 128, 32, "float32"))
ROUNDS = 5
LONGEST_SLOW = 1024  # tokens: beyond, what is slow or hungry by design is left out


def plain_scan(w_D, u_D, k_BTD, v_BTD):
    """Eq. 16 in its safe form (Eqs. 23-28) as one scan over time, differentiated by JAX: what one writes first."""

    def step(carry, kv):
        num, den, p = carry
        k, v = kv
        q = jnp.maximum(p, u_D + k)
        e1, e2 = jnp.exp(p - q), jnp.exp(u_D + k - q)
        y = (e1 * num + e2 * v) / (e1 * den + e2)
        q = jnp.maximum(p + w_D, k)
        e1, e2 = jnp.exp(p + w_D - q), jnp.exp(k - q)
        return (e1 * num + e2 * v, e1 * den + e2, q), y

    B, _, D = k_BTD.shape
    empty = jnp.zeros((B, D)), jnp.zeros((B, D)), jnp.full((B, D), -1e38)
    return jax.lax.scan(step, empty, (k_BTD.swapaxes(0, 1), v_BTD.swapaxes(0, 1)))[1].swapaxes(0, 1)


def inputs(B, T, D, dtype, count):
    """(w, u, k, v, dy), random and different each time."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    for _ in range(count):
        tokens = [jnp.asarray(normal(B, T, D), dtype) for _ in range(3)]
        yield jax.block_until_ready((-jnp.exp(normal(D)), jnp.asarray(normal(D)), *tokens))


def jax_sides(wkv, shape):
    """({"forward": run, "both": run}, {"compile_seconds", "temporary_bytes"}) of one form at one shape."""
    forward = lambda w, u, k, v, dy: wkv(w, u, k, v)
    loss = lambda w, u, k, v, dy: (wkv(w, u, k, v).astype(jnp.float32) * dy).sum()
    both = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    arguments = next(inputs(*shape, 1))
    sides, facts = {}, {}
    for name, f in (("forward", forward), ("both", both)):
        start = time.perf_counter()
        compiled = jax.jit(f).lower(*arguments).compile()
        facts[name] = {
            "compile_seconds": time.perf_counter() - start,
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        sides[name] = lambda x, compiled=compiled: jax.block_until_ready(compiled(*x))
    return sides, facts


def transformers_sides():
    """transformers' loop for CPUs, forward and with its backward by autograd."""
    import torch
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    def run(x, backward):
        w, u, k, v, dy = (torch.from_numpy(np.array(a, np.float32)).requires_grad_(backward) for a in x)
        y, _ = rwkv_linear_attention_cpu(torch.log(-w), u, k, v)
        if backward:
            (y * dy.detach()).sum().backward()

    return {"forward": partial(run, backward=False), "both": partial(run, backward=True)}


def forms(T):
    """The forms worth timing here, by name."""
    platform = jax.default_backend()
    named = ("scan", "associative", *(["pallas"] if platform == "tpu" else []))
    found = {name: partial(wkv4, impl=name) for name in named}
    found = {name: lambda *args, form=form: form(*args)[0] for name, form in found.items()}
    if T <= LONGEST_SLOW:
        found["plain scan, autodiff"] = plain_scan
    return found


def measure(shape, rounds, bandwidth):
    """One row for each form at one shape."""
    B, T, D, dtype = shape
    sides, facts = {}, {}
    for name, form in forms(T).items():
        runs, facts[name] = jax_sides(form, shape)
        sides |= {(name, which): run for which, run in runs.items()}
    if T <= LONGEST_SLOW and dtype == "float32":
        sides |= {("transformers", which): run for which, run in transformers_sides().items()}
    seconds = medians(sides, inputs(*shape, (rounds + 1) * len(sides)), rounds)
    array = B * T * D * jnp.dtype(dtype).itemsize
    least = {"forward": 3 * array, "both": 8 * array}  # k, v, y; then k, v, dy, dk, dv as well
    return [
        {
            "form": name,
            "shape": list(shape),
            "pass": which,
            "seconds": t,
            "share_of_copy": least[which] / bandwidth / t,
            **facts.get(name, {}).get(which, {}),
        }
        for (name, which), t in seconds.items()
    ]


def run(smoke):
    """Rows of every form and shape, and the claims made of them."""
    bandwidth = hardware.copy_bandwidth()
    rows = []
    for shape in SMOKE_SHAPES if smoke else SHAPES:
        rows += measure(shape, 1 if smoke else ROUNDS, bandwidth)
        for row in rows:
            if row["shape"] == list(shape):
                print("{form:<22} {shape} {pass:<8} {seconds:9.4f} s".format(**row), flush=True)
    return {"copy_bytes_per_second": bandwidth, "rows": rows} | ({} if smoke else {"claims": claims(rows)})


def claims(rows):
    """(what, measured, at most) of what is promised on a CPU."""
    at = lambda form, which, shape=CLAIMED: next(
        r for r in rows if r["form"] == form and r["pass"] == which and r["shape"] == list(shape)
    )
    both, plain = at("scan", "both"), at("plain scan, autodiff", "both")
    short, long = ((1, T, 512, "float32") for T in (32768, 131072))
    a_token = lambda shape: at("scan", "both", shape)["seconds"] / shape[1]
    return [
        ("forward and backward over autodiff through a plain scan", both["seconds"] / plain["seconds"], 0.35),
        ("forward and backward over forward", both["seconds"] / at("scan", "forward")["seconds"], 3.0),
        ("temporary memory over autodiff's", both["temporary_bytes"] / plain["temporary_bytes"], 0.25),
        ("time a token at 131,072 over 32,768 tokens", a_token(long) / a_token(short), 1.25),
    ]
