"""Settings that hold for every test, made before jax is imported."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
# Most programs here run for milliseconds and compile for seconds; without LLVM's optimisations for a third of that.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the suite on what users run; it passes either way.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A program that one test has compiled is read back by the next, and by the next run: a third of the suite's time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**29))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Thousands of compiled programs in one process end in a crash: Linux allows 65,530 memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """64-bit arrays for one test."""
    with jax.enable_x64(True):
        yield
