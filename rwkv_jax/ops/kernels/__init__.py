"""The recurrences of `ops` as fused kernels: the same functions, one file per operator and target."""

import re
from functools import cache

import jax


@cache
def hopper_at_hand() -> bool:
    """Whether JAX's devices are NVIDIA GPUs of compute capability 9.0 or later."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; of an AMD GPU "gfx942"
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 9
