"""The check of the arguments of every operator, and the choice of the form that is traced."""

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
    """Raise ValueError for the first argument, given as name=(array or None, shape), that has another shape."""
    for name, (x, shape) in arrays.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {x.shape}, expected {shape}")


def accumulator_dtype(*arrays):
    """The dtype in which a recurrence of these arrays is computed: float32, or float64 if one of them is."""
    return jnp.result_type(*(x.dtype for x in arrays), jnp.float32)


@cache
def hopper_at_hand() -> bool:
    """Return whether JAX's devices are NVIDIA GPUs of compute capability 9.0 or later."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; of an AMD GPU "gfx942"
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 9


def target_platform() -> str:
    """The platform for which code is traced now, as JAX names it: "cpu", "gpu", "tpu" or another.

    It is the platform of the mesh in context (`jax.set_mesh`), else of `jax.default_device`, else JAX's default
    backend. It is known before anything is traced, so that one form is traced, where `jax.lax.platform_dependent`
    traces all that it may choose from. The devices of committed arrays are not known by then.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def run_form(op: Callable, form: str, *operands, gpu_kernel: bool = True):
    """`op(form, *operands)`, with kernels on the platforms that they are written for.

    Args:
        op: takes the name of a form, or of a kernel: "tpu", "gpu", and "interpreted", that for TPUs run on a CPU.
        form: a form in plain JAX; "pallas", the kernel of the platform for which the program is lowered; or "tpu" or
            "gpu", that kernel, chosen by `target_platform()`: there, arrays that are committed to the CPU of the same
            machine take "scan".
        gpu_kernel: False where the kernel for GPUs does not take these operands.
    """
    if form in ("tpu", "gpu"):
        return jax.lax.platform_dependent(*operands, cpu=partial(op, "scan"), default=partial(op, form))
    if form != "pallas":
        return op(form, *operands)
    kernels = {"cpu": "interpreted", "tpu": "tpu"} | ({"cuda": "gpu"} if gpu_kernel else {})
    return jax.lax.platform_dependent(*operands, **{name: partial(op, kernel) for name, kernel in kernels.items()})
