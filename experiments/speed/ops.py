"""Every form of WKV-4 over lengths, sizes and dtypes: time, memory, compile time and share of the roofline.

The roofline is the time of moving the least number of bytes. Peers are autodiff of a plain scan and, on a GPU, those
that `gpu_peers` finds. Times there include launching a program (tens of microseconds).
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp

from experiments.speed import gpu_peers
from experiments.speed.timing import medians
from rwkv_jax import hardware
from rwkv_jax.ops import wkv4
from rwkv_jax.ops.wkv4 import FORMS

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
# The claimed shapes first: when time runs out, the rest is left out.
GPU_CLAIMED = tuple((8, T, 4096, "bfloat16") for T in (4096, 1024, 16384))
GPU_SHAPES = (*GPU_CLAIMED, *((8, T, 768, "bfloat16") for T in (1024, 4096, 16384)))
GPU_SECONDS = 420  # start no shape after this time
SMOKE_SHAPES = ((2, 64, 32, "float32"), (1, 128, 32, "float32"))
ROUNDS = 5
LONGEST_PLAIN = 1024  # tokens: beyond, autodiff of the plain scan takes too much memory


def plain_scan(w_D, u_D, k_BTD, v_BTD, stored=lambda x: x):
    """Eq. 16 in its safe form (Eqs. 23-28) as one scan over time, for JAX to differentiate.

    This is the straightforward implementation. `stored` maps a state's arrays between tokens.
    """

    def step(carry, kv):
        num, den, p = carry
        k, v = kv
        q = jnp.maximum(p, u_D + k)
        e1, e2 = jnp.exp(p - q), jnp.exp(u_D + k - q)
        y = (e1 * num + e2 * v) / (e1 * den + e2)
        q = jnp.maximum(p + w_D, k)
        e1, e2 = jnp.exp(p + w_D - q), jnp.exp(k - q)
        return (stored(e1 * num + e2 * v), stored(e1 * den + e2), stored(q)), y

    B, _, D = k_BTD.shape
    empty = jnp.zeros((B, D)), jnp.zeros((B, D)), jnp.full((B, D), -1e38)
    return jax.lax.scan(step, empty, (k_BTD.swapaxes(0, 1), v_BTD.swapaxes(0, 1)))[1].swapaxes(0, 1)


def inputs(B, T, D, dtype, count):
    """Yield (w, u, k, v, dy), different each time: random, then rolled along time, which is faster than drawing."""
    keys = jax.random.split(jax.random.key(0), 5)
    w_D, u_D = (jax.random.normal(key, (D,)) for key in keys[:2])
    tokens = [jax.jit(lambda key: jax.random.normal(key, (B, T, D)).astype(dtype))(key) for key in keys[2:]]
    roll = jax.jit(lambda x_BTD, by: jnp.roll(x_BTD, by, axis=1))
    for i in range(count):
        yield jax.block_until_ready((-jnp.exp(w_D + 0.01 * i), u_D - 0.01 * i, *(roll(x, i) for x in tokens)))


def jax_sides(wkv, shape):
    """Return ({"forward": run, "both": run}, {"compile_seconds", "temporary_bytes"}) of one form at one shape."""

    def both(w, u, k, v, dy):
        y, pull = jax.vjp(wkv, w, u, k, v)
        return y, pull(dy.astype(y.dtype))

    arguments = next(inputs(*shape, 1))
    sides, facts = {}, {}
    for name, f in (("forward", lambda w, u, k, v, dy: wkv(w, u, k, v)), ("both", both)):
        start = time.perf_counter()
        compiled = jax.jit(f).lower(*arguments).compile()
        facts[name] = {
            "compile_seconds": time.perf_counter() - start,
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        sides[name] = lambda x, compiled=compiled: jax.block_until_ready(compiled(*x))
    return sides, facts


def forms(T):
    """Return the forms to time on this backend, by name."""
    named = (
        FORMS[:2] if jax.default_backend() == "cpu" else FORMS
    )  # an interpreted kernel's time on a CPU means nothing
    found = {name: lambda *args, name=name: wkv4(*args, impl=name)[0] for name in named}
    if T <= LONGEST_PLAIN:
        found["plain scan, autodiff"] = plain_scan
    return found


def measure(shape, rounds, bandwidth, rwkv_lm=None):
    """Return one row per form at one shape; a form that could not run has the reason instead of seconds."""
    B, T, D, dtype = shape
    sides, facts = {}, {}
    for name, form in forms(T).items():
        runs, facts[name] = jax_sides(form, shape)
        sides |= {(name, which): run for which, run in runs.items()}
    failed = {}
    if jax.default_backend() == "gpu":
        for name, runs in gpu_peers.sides(shape, rwkv_lm).items():
            sides |= {(name, which): run for which, run in runs.items()}
        sides, failed = first_calls(sides, inputs(*shape, len(sides)))
    seconds = medians(sides, inputs(*shape, (rounds + 1) * len(sides)), rounds)
    array = B * T * D * jnp.dtype(dtype).itemsize
    least = {"forward": 3 * array, "both": 8 * array}  # k, v, y; then k, v, dy, dk, dv as well
    rows = []
    for name, which in (*seconds, *failed):
        row = {"form": name, "shape": list(shape), "pass": which, **facts.get(name, {}).get(which, {})}
        if t := seconds.get((name, which)):
            row |= {"seconds": t, "share_of_copy": least[which] / bandwidth / t}
        else:
            row |= {"seconds": None, "left_out": failed[name, which]}
        rows.append(row)
    return rows


def first_calls(sides, given):
    """Return (sides that ran once, reasons of the others). Our own forms may fail only for lack of memory."""
    able, failed = {}, {}
    for side, run in sides.items():
        try:
            run(next(given))
            able[side] = run
        except Exception as error:
            memory = "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
            if side[0] in FORMS and not memory:
                raise
            failed[side] = "out of memory" if memory else " ".join(str(error).split())[:200]
    return able, failed


def in_a_process(f, *args):
    """Call f(*args) in a process of its own.

    torch loads the released kernel, which has one length compiled in, only once per process.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def run(smoke, rwkv_lm=None):
    """Return the rows of every form and shape, and the claims on them. `rwkv_lm`: see `gpu_peers`."""
    on_gpu = jax.default_backend() == "gpu"
    if rwkv_lm is not None:
        gpu_peers.sources(rwkv_lm)
    bandwidth, began = hardware.copy_bandwidth(), time.perf_counter()
    rows, left_out = [], gpu_peers.missing(rwkv_lm) if on_gpu else []
    for shape in SMOKE_SHAPES if smoke else GPU_SHAPES if on_gpu else SHAPES:
        if on_gpu and time.perf_counter() - began > GPU_SECONDS:
            left_out.append(f"{list(shape)}: no time left")
            continue
        todo = (shape, 1 if smoke else ROUNDS, bandwidth, rwkv_lm)
        new = in_a_process(measure, *todo) if on_gpu else measure(*todo)
        for row in new:
            took = f"{row['seconds']:9.5f} s" if row["seconds"] else row["left_out"]
            print(f"{row['form']:<22} {row['shape']} {row['pass']:<8} {took}", flush=True)
        rows += new
    claimed = [] if smoke else gpu_claims(rows) if on_gpu else claims(rows)
    return {"copy_bytes_per_second": bandwidth, "rows": rows, "claims": claimed, "left_out": left_out}


def report(results: dict) -> list[str]:
    """Return lines on the claims and on what was left out; rows are printed while they run."""
    lines = [f"{what}: {x:.2f} (at most {most} wanted)" for what, x, most in results["claims"]]
    return lines + [f"left out: {what}" for what in results["left_out"]]


def gpu_claims(rows):
    """Return (claim, measured, at most) of the claims on a GPU, as far as they were measured."""
    found = {}
    for shape in GPU_CLAIMED:
        here = [r for r in rows if r["shape"] == list(shape) and r["pass"] == "both" and r["seconds"]]
        ours = min((r for r in here if r["form"] in FORMS), key=lambda r: r["seconds"], default=None)
        if ours is None:
            continue
        label = f"forward and backward, T {shape[1]:,}, by {ours['form']}"
        found[f"{label}, over the time of moving its bytes"] = 1 / ours["share_of_copy"], 1.67
        for peer in (r for r in here if r["form"] in (gpu_peers.CUDA, gpu_peers.ATTENTION)):
            found[f"{label}, over {peer['form']}"] = ours["seconds"] / peer["seconds"], 1.0
    return [(what, x, most) for what, (x, most) in found.items()]


def claims(rows):
    """Return (claim, measured, at most) of the claims on a CPU."""
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
