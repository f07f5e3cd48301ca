"""Settings for every test, made before jax is imported, and the count of programs that tests compile."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most programs here run for milliseconds and compile for seconds: a third of that without LLVM's optimisations, and
# half of it again without XLA's new fusion emitters (a version that has no such option ignores it).
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs the suite with the optimisations that users have.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
        else "",
        # on a busy machine devices meet late in a collective operation; XLA ends the process after 40 s
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        os.environ.get("XLA_FLAGS", ""),
    )
)
# Programs that take long to compile are read back by the next run. No limit on the size of the cache: with one, JAX
# looks at every entry at every write.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jax.monitoring
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

BUDGET = 40  # programs that the fast tests of a file may compile; a file that needs more sets PROGRAMS
MEMORY_MAPS = 40_000  # Linux allows a process 65,530, and every compiled program takes some
COMPILE = "/jax/core/compile/backend_compile_duration"  # includes programs read from the cache on disk

programs = {}  # compiled by the tests of each file


def _count(event, seconds, **_):
    if event == COMPILE:
        programs["in all"] = programs.get("in all", 0) + 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(scope="module", autouse=True)
def programs_within_budget(request):
    """Fail a file whose fast tests compile more programs than its budget: compiling takes most of the suite's time."""
    before = programs.get("in all", 0)
    yield
    name = str(request.path.relative_to(request.config.rootpath))
    programs[name] = programs.get("in all", 0) - before
    allowed = getattr(request.module, "PROGRAMS", BUDGET)
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MEMORY_MAPS:
        jax.clear_caches()
    if request.config.option.markexpr == "not slow and not live" and programs[name] > allowed:
        compiled = f"{name} compiled {programs[name]} programs, expected at most {allowed}"
        pytest.fail(f"{compiled}; JAX_LOG_COMPILES=1 lists them, see Tests in CONTRIBUTING.md", pytrace=False)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["programs"] = programs


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, count in getattr(node, "workeroutput", {}).get("programs", {}).items():
        programs[name] = programs.get(name, 0) + count


def pytest_terminal_summary(terminalreporter):
    most = sorted((count, name) for name, count in programs.items() if name != "in all")[-3:]
    listed = ", ".join(f"{name} {count}" for count, name in reversed(most))
    terminalreporter.write_line(f"{programs.get('in all', 0):,} programs compiled; by file: {listed or 'none'}")


@pytest.fixture
def compiled():
    """A function that returns the number of programs compiled since it was last called."""
    last = programs.get("in all", 0)

    def count():
        nonlocal last
        before, last = last, programs.get("in all", 0)
        return last - before

    return count


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def text(module_patch, tmp_path_factory):
    """The path of a text, and a cache of tokens beside it."""
    import training  # imports the package, so only when needed

    folder = tmp_path_factory.mktemp("text")
    module_patch.setenv("RWKV_JAX_CACHE", str(folder / "cache"))
    return training.write_text(folder / "corpus.txt")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """64-bit arrays for one test."""
    with jax.enable_x64(True):
        yield
