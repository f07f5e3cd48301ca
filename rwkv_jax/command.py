"""End a command early: one line on stderr and an exit code for a mistake of the user, a traceback for one of ours."""

import functools
import os
import select
import sys
from collections.abc import Callable

STDOUT = 1  # its file descriptor


def reported(interrupted: str = "stopped", out_of_memory: str = "use a larger machine") -> Callable:
    """Decorate a command's `main`: it then returns an exit code, 0 for None, also where it would raise

        KeyboardInterrupt       130, after the line `interrupted`
        ValueError, OSError     2, after "error: " and the message: the user's mistakes
        no memory left          2, after "error: out of memory; " and the advice `out_of_memory`
        BrokenPipeError         0, without a line, where nobody reads stdout any more: `... | head`

    Other exceptions pass.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None) -> int:
            try:
                code = main(argv)
                print(end="", flush=True)  # while a failure can still be reported
                return code or 0
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError) and _stdout_lost_its_reader():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what is left to flush
                    return 0
                message = " ".join(str(error).split())
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                message = ": ".join([f"out of memory; {out_of_memory}", *str(error).splitlines()[:1]])
            print(f"error: {message}", file=sys.stderr)
            return 2

        return run

    return decorate


def is_out_of_memory(error: Exception) -> bool:
    """True for the error of Python and NumPy, and for that of XLA on any device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _stdout_lost_its_reader() -> bool:
    """True for a pipe that is closed at its other end; files, sockets and other pipes fail too."""
    stdout = select.poll()
    stdout.register(STDOUT, 0)  # errors are reported unasked
    return bool(stdout.poll(0))
