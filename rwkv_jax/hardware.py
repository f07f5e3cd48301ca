"""FLOP counts and peak rates: what the hardware could do, against which speed is judged."""

import time

import jax
import jax.numpy as jnp

# Peak dense bf16 FLOP/s of one chip, by the prefix of jax's device_kind, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device) -> float | None:
    """Peak bf16 FLOP/s of a device, None where no data sheet says (CPUs: see `matmul_peak`)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


def matmul_peak(size: int = 2048, seconds: float = 1.0) -> float:
    """Float32 matrix-multiply FLOP/s that this machine reaches, the best of repeated [size, size] products."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    return 2 * size**3 / _best_seconds(lambda: product(a, b), seconds)


def copy_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second, read and written together, of the best of repeated passes over an array.

    In place: on a CPU, a copy into fresh memory measures how fast the system hands out pages (8 of 70 GB/s).
    """
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = _large_array()

    def copy():
        nonlocal x
        x = step(x)
        return x

    return 2 * x.nbytes / _best_seconds(copy, seconds)


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second of the best of repeated sums over an array."""
    x, total = _large_array(), jax.jit(jnp.sum)
    return x.nbytes / _best_seconds(lambda: total(x), seconds)


def _large_array():
    """Larger than caches; on accelerators large enough that starting a program does not count."""
    return jax.random.normal(jax.random.key(0), (2**26 if jax.default_backend() == "cpu" else 2**30,))


def _best_seconds(f, seconds):
    jax.block_until_ready(f())
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(f())
        best = min(best, time.perf_counter() - start)
    return best


def flops_per_token(model, seq_len: int) -> float:
    """Training FLOPs of one token, forward and backward: 6 for every weight of a matrix product, the embedding's
    look-up free (Table 2 counts 2 (V D + 13 D^2 L) forward), plus 6 L D T for causal attention over T tokens and
    60 L D for WKV (about 20 forward a channel; 0.1 % at D 512)."""
    D, repeats = model.dim, model.num_layers // len(model.layers)
    total = 6.0 * model.vocab_size * D
    for kind in model.layers:
        if kind == "rwkv4":
            layer = 6 * (5 * D**2 + 2 * D * (model.hidden_dim or 4 * D)) + 60 * D
        else:
            layer = 6 * (4 * D**2 + 2 * D * (model.hidden_dim or 9 * D // 2)) + 6 * D * seq_len
        total += repeats * layer
    return total
