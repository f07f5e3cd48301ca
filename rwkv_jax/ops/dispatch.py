"""Which form of an operator is traced: chosen by the platform, before anything is traced."""

import re
from functools import cache

import jax
import jax.numpy as jnp


@cache
def hopper_at_hand() -> bool:
    """Whether JAX's devices are NVIDIA GPUs of compute capability 9.0 or later."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; of an AMD GPU "gfx942"
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 9


def target_platform() -> str:
    """Where what is traced now will run, as JAX names it: "cpu", "gpu", "tpu" or another.

    The platform of the mesh in context (`jax.set_mesh`), else of `jax.default_device`, else JAX's default backend. It
    is known before anything is traced, so that one form is, where `jax.lax.platform_dependent` traces all that it may
    choose from. The devices of committed arrays are not known by then.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def suited_form(platform: str, dtype) -> str:
    """The form of WKV for a platform and a dtype of its accumulators: "scan", "associative", or the kernel "tpu" or
    "gpu". What is known, 2026-11-24:

    CPU: measured on 2 cores, scan is the fastest at every length and size (experiments/speed/results.json).
    TPU: compiled for v5e and v5p, not run. Forward and backward at B 8, T 4,096, D 1,024, bfloat16: associative
      accesses 66 to 70 times the bytes of inputs and outputs and takes 2.0 GB beside them, the kernel 0.07 GB.
    CUDA: measured on an H100, forward and backward at B 8, T 4,096, D 4,096, bfloat16: the kernel 1.2 ms,
      associative 11.7, scan 113, the released CUDA kernel 4.2. The kernel needs Hopper.
    """
    if platform in ("cpu", "tpu"):
        return {"cpu": "scan", "tpu": "tpu"}[platform]
    return "gpu" if platform == "gpu" and dtype != jnp.float64 and hopper_at_hand() else "associative"
