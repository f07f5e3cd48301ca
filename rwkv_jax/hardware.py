"""FLOP counts, data sheets of chips, and measured peak rates."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chip(NamedTuple):
    """The data sheet of one chip. Its rates are upper bounds that no program reaches."""

    kind: str  # prefix of jax's device_kind
    flops: float  # dense bf16 FLOP/s
    memory: float  # bytes of HBM
    memory_rate: float  # bytes/s
    link_rate: float  # bytes/s into the chip from the others of its slice or node, over all links together
    network_rate: float | None  # bytes/s into the chip from other slices or nodes; None: depends on the cluster
    source: str


_TPU, _NVIDIA = "docs.cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
# The vendors give the links' bandwidth of both directions together: half of it goes into a chip.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * 2**30, 1200e9, 270e9, None, _TPU + "v4, links: jax-ml.github.io/scaling-book"),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, _TPU + "v6e, which has both"),
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, _TPU + "v5p"),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * 2**30, 1638e9, 400e9, 12.5e9, _TPU + "v6e"),
    "a100": Chip("NVIDIA A100", 312e12, 80e9, 2039e9, 300e9, None, _NVIDIA + "a100"),
    "h100": Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, None, _NVIDIA + "h100"),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, None, _NVIDIA + "h200"),
}


def peak_flops(device) -> float | None:
    """Peak bf16 FLOP/s of a device, None without a data sheet (CPUs: see `matmul_peak`)."""
    fitting = [chip for chip in CHIPS.values() if device.device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind)).flops if fitting else None


def matmul_peak(size: int = 2048) -> float:
    """Float32 matrix-multiply FLOP/s that this machine reaches, the best of repeated [size, size] products."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    return 2 * size**3 / _best_seconds(lambda: product(a, b))


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of the best of repeated passes over an array.

    In-place: on a CPU, a copy into fresh memory measures the system's page allocation (8 of 70 GB/s).
    """
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = _large_array()

    def copy():
        nonlocal x
        x = step(x)
        return x

    return 2 * x.nbytes / _best_seconds(copy)


def read_bandwidth() -> float:
    """Bytes a second of the best of repeated sums over an array."""
    x, total = _large_array(), jax.jit(jnp.sum)
    return x.nbytes / _best_seconds(lambda: total(x))


def _large_array():
    """Return an array larger than caches; on accelerators so large that the launch of a program is negligible."""
    return jax.random.normal(jax.random.key(0), (2**26 if jax.default_backend() == "cpu" else 2**30,))


def _best_seconds(f):
    jax.block_until_ready(f())
    best, end = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(f())
        best = min(best, time.perf_counter() - start)
    return best


def flops_per_token(model, seq_len: int) -> float:
    """Training FLOPs of one token, forward and backward: 6 for every weight of a matrix product, the embedding's
    look-up free (Table 2 counts 2 (V D + 13 D^2 L) forward), and what a kind of layer adds (`Kind.flops`)."""
    head = 6.0 * model.vocab_size * model.dim
    return head + sum(kind.flops(config, seq_len) for _, kind, config in model.every_layer)


def recomputed_flops_per_token(model) -> float:
    """FLOPs that `model.remat` adds to `flops_per_token`: products with weights of the default hidden widths.

    `Kind.recomputed` has, for each choice in `models.lm.REMAT`, the products with D^2 weights that the backward pass
    computes again; RWKV-4 has 13 in a layer's forward pass. Products with low-rank maps are not counted.
    """
    return sum(2 * model.dim**2 * kind.recomputed.get(model.remat, 0) for _, kind, _ in model.every_layer)
