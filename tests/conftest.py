"""Settings that hold for every test, made before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Four virtual devices. The compiler pass is left out because these programs run for milliseconds and compile for
# seconds: less than half of the time; every test also passes with it.
FLAGS = ("--xla_force_host_platform_device_count=4", "--xla_llvm_disable_expensive_passes=true")
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """64-bit arrays for one test."""
    with jax.enable_x64(True):
        yield
