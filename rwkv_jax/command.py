"""Commands: escapes in the text of an option, and one line on stderr and an exit code for a mistake of the user.

@command.reported()
def main(argv=None): ...

command.end(main())  # where the module is run
"""

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
    r"""Return the text that an option spells with \n, \t and \\, which a shell hands on as they are."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)


def program(module: str) -> str:
    """Return how a user has run the command of a module, for its usage line: `rwkv-jax VERB` or `python -m MODULE`."""
    path, *rest = sys.argv
    return f"{SCRIPT} {rest[0]}" if Path(path).name == SCRIPT and rest else f"python -m {module}"


def reported(interrupted: str = "stopped", out_of_memory: str = "use a larger machine") -> Callable:
    """Decorate a command's `main`: it then returns an exit code, 0 for None, also where it would raise

        KeyboardInterrupt       130, after the line `interrupted`
        no memory left          2, after "error: out of memory; ", the advice `out_of_memory` and what was asked for
        no device for JAX       2, after "error: JAX_PLATFORMS is ", where that asks for what is not here
        ValueError, OSError     2, after "error: " and the message: the user's mistakes
        BrokenPipeError         0, without a line, where nobody reads stdout any more: `... | head`

    Other exceptions pass.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None) -> int:
            if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that is no UTF-8 is printed as it is
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
                    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what is left to flush
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

    After an interrupt or an error XLA may still compile or compute on threads of its own. An orderly end would free
    what they use, and they would die of SIGSEGV in place of `code`; and of several hosts it would wait for the others.
    """
    if not code:
        sys.exit()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # either may have been closed: `>&-`
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def end_while_importing(signum, frame) -> NoReturn:
    """Handle SIGINT until a `reported` main begins: imports take seconds, and nothing has been touched."""
    os.write(STDERR, b"stopped\n")
    os._exit(130)


def is_out_of_memory(error: Exception) -> bool:
    """True for the error of Python, NumPy and the system, and for that of XLA on any device."""
    told = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY"))
    return told or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def missing_devices(error: Exception | None) -> str | None:
    """Return one line where JAX_PLATFORMS is the cause of an error, an AssertionError or RuntimeError; else None."""
    if not os.environ.get("JAX_PLATFORMS") or "jax" not in sys.modules:
        return None
    while error is not None and not isinstance(error, AssertionError | RuntimeError):
        error = error.__cause__
    if error is None:
        return None
    try:
        sys.modules["jax"].devices()
    except (AssertionError, RuntimeError):
        return f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']!r}, and JAX finds no such device here"
    return None


def _stdout_lost_its_reader() -> bool:
    """True for a pipe that is closed at its other end; files, sockets and other pipes fail too."""
    stdout = select.poll()
    stdout.register(STDOUT, 0)  # errors are reported unasked
    return bool(stdout.poll(0))
