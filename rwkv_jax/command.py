"""Commands: escapes in option text, and user errors as one line on stderr and an exit code.

@command.reported()
def main(argv=None): ...

command.end(main())  # where the module is run
"""

import argparse
import contextlib
import errno
import functools
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

SCRIPT = "rwkv-jax"  # see `rwkv_jax.__main__`
STDOUT, STDERR = 1, 2  # file descriptors
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def unescaped(text: str) -> str:
    r"""Return an option's text with \n, \t and \\ expanded, which shells pass on unchanged."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)


def program(module: str) -> str:
    """Return how a user has run the command of a module, for its usage line: `rwkv-jax VERB` or `python -m MODULE`."""
    path, *rest = sys.argv
    return f"{SCRIPT} {rest[0]}" if Path(path).name == SCRIPT and rest else f"python -m {module}"


class Parser(argparse.ArgumentParser):
    """A parser, for use in a `reported` main, whose errors are a ValueError: without the usage in front of them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def reported(interrupted: str = "stopped", out_of_memory: str = "use a larger machine") -> Callable:
    """Decorate a command's `main`: it then returns an exit code, 0 for None, also for these exceptions:

        KeyboardInterrupt       130, after the line `interrupted`
        out of memory           2, after "error: out of memory; ", the advice `out_of_memory` and the failed request
        no device for JAX       2, after "error: JAX_PLATFORMS is ", if that names a platform without devices
        ValueError, OSError     2, after "error: " and the message: user errors
        BrokenPipeError         0, without a line, if the reader of stdout has exited: `... | head`

    Other exceptions propagate.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None) -> int:
            if isinstance(sys.stdout, io.TextIOWrapper):  # file names that are not UTF-8 are printed unchanged
                sys.stdout.reconfigure(errors="surrogateescape")
            if signal.getsignal(signal.SIGINT) is end_while_importing:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                code = main(argv)
                print(end="", flush=True)  # while a failure can still be reported
                return code or 0
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130
            except (MemoryError, RuntimeError, ValueError, OSError, AssertionError) as error:
                if isinstance(error, BrokenPipeError) and _stdout_lost_its_reader():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for the flush at exit
                    return 0
                if is_out_of_memory(error):
                    message = ": ".join([f"out of memory; {out_of_memory}", *str(error).splitlines()[:1]])
                elif lacking := missing_devices(error):
                    message = lacking
                elif isinstance(error, RuntimeError | AssertionError):
                    raise
                else:
                    message = " ".join(str(error).split())
            print(f"error: {message}", file=sys.stderr)
            return 2

        return run

    return decorate


def end(code: int) -> NoReturn:
    """End the process of a command that returned `code`.

    After an interrupt or an error XLA may still compile or compute on its own threads. A normal exit would free what
    they use, so that the process dies of SIGSEGV instead of returning `code`; with several hosts it would wait for the
    others.
    """
    if not code:
        sys.exit()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # either may have been closed: `>&-`
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def end_while_importing(signum, frame) -> NoReturn:
    """Handle SIGINT until a `reported` main begins: imports take seconds and change nothing."""
    os.write(STDERR, b"stopped\n")
    os._exit(130)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of Python, NumPy, the system, or XLA on any device means out of memory."""
    told = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY"))
    return told or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def missing_devices(error: Exception | None) -> str | None:
    """Return one line if JAX_PLATFORMS caused an error, which JAX reports as an AssertionError or a RuntimeError."""
    if not os.environ.get("JAX_PLATFORMS") or "jax" not in sys.modules:
        return None
    while error is not None and not isinstance(error, AssertionError | RuntimeError):
        error = error.__cause__
    if error is None:
        return None
    try:
        sys.modules["jax"].devices()
    except (AssertionError, RuntimeError):
        return f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']!r}, but JAX finds no such device"
    return None


def _stdout_lost_its_reader() -> bool:
    """Return whether stdout is a pipe without a reader; a BrokenPipeError may come from other files."""
    stdout = select.poll()
    stdout.register(STDOUT, 0)  # errors are always reported
    return bool(stdout.poll(0))
