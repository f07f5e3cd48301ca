"""Argument checks of every operator, and the choice of the form to trace."""

import re
from collections.abc import Callable, Iterable
from functools import cache, partial

import jax
import jax.numpy as jnp


def check_form(impl: str | None, forms: Iterable[str]) -> None:
    """Raise ValueError unless `impl` is None or the name of a form."""
    if impl is not None and impl not in forms:
        raise ValueError(f"impl is {impl!r}, expected None or one of {', '.join(forms)}")


def check_shapes(**arrays: tuple) -> None:
    """Raise ValueError for the first name=(array or None, expected shape) that does not match."""
    for name, (x, shape) in arrays.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {x.shape}, expected {shape}")


def accumulator_dtype(*arrays):
    """The dtype in which a recurrence of these arrays is computed: float32, or float64 if one of them is."""
    return jnp.result_type(*(x.dtype for x in arrays), jnp.float32)


HOPPER = 9.0  # `cuda_capability`


@cache
def cuda_capability() -> float:
    """Return the compute capability of JAX's first device, 0 if it is not an NVIDIA GPU."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; of an AMD GPU "gfx942"
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0


def target_platform() -> str:
    """The platform that code is being traced for, as JAX names it: "cpu", "gpu", "tpu" or another.

    This is the platform of the mesh in context (`jax.set_mesh`), else of `jax.default_device`, else JAX's default
    backend. It is known before tracing, so only one form is traced; `jax.lax.platform_dependent` traces all its
    branches. The devices of committed arrays are not yet known.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def run_form(op: Callable, form: str, *operands, gpu_kernel: bool = True):
    """Return `op(form, *operands)`, with kernels on the platforms that they are written for.

    Args:
        op: takes the name of a form, or of a kernel: "tpu", "gpu", and "interpreted", the one for TPUs run on a CPU.
        form: a form in plain JAX; "pallas", the kernel of the platform that the program is lowered for; or "tpu" or
            "gpu", chosen by `target_platform()`: that kernel, but "scan" for arrays committed to the host's CPU.
        gpu_kernel: False where the kernel for GPUs does not support these operands.
    """
    if form in ("tpu", "gpu"):
        return jax.lax.platform_dependent(*operands, cpu=partial(op, "scan"), default=partial(op, form))
    if form != "pallas":
        return op(form, *operands)
    kernels = {"cpu": "interpreted", "tpu": "tpu"} | ({"cuda": "gpu"} if gpu_kernel else {})
    return jax.lax.platform_dependent(*operands, **{name: partial(op, kernel) for name, kernel in kernels.items()})
