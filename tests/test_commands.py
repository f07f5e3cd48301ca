"""How commands end early, and that every command of the package ends so."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import rwkv_jax
from rwkv_jax import command

PACKAGE = Path(rwkv_jax.__file__).parent
COMMANDS = sorted(path for path in PACKAGE.rglob("*.py") if '__name__ == "__main__"' in path.read_text())
ON_A_DEVICE = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."


def ended(error, capsys, **lines):
    """Exit code and stderr of a command whose body raises `error`."""

    @command.reported(**lines)
    def main(argv):
        raise error

    code = main()
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "kept"),
        (ValueError("a is 1,\n  expected 2"), 2, "error: a is 1, expected 2"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: [Errno 32] Broken pipe"),  # of a socket: stdout is open
        (MemoryError("Unable to allocate 8 GiB"), 2, "error: out of memory; lower b: Unable to allocate 8 GiB"),
        (jax.errors.JaxRuntimeError(f"{ON_A_DEVICE}\nmore"), 2, f"error: out of memory; lower b: {ON_A_DEVICE}"),
    ],
)
def test_reported_command_ends_with_one_line_and_an_exit_code(error, code, line, capsys):
    assert ended(error, capsys, interrupted="kept", out_of_memory="lower b") == (code, f"{line}\n")


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: a"), KeyError("a")])
def test_reported_command_raises_what_is_not_the_users_mistake(error, capsys):
    with pytest.raises(type(error)):
        ended(error, capsys)


def test_reported_command_returns_its_own_exit_code():
    assert [command.reported()(lambda argv: argv)(code) for code in (None, 0, 1, 130)] == [0, 0, 1, 130]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reported_command_is_silent_where_nobody_reads_its_output(unbuffered):
    program = "import sys; from rwkv_jax import command; sys.exit(command.reported()(print)())"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_command_ends_as_reported(path, monkeypatch, capsys):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    main = importlib.import_module(name).main

    def parse(*args):
        raise OSError("a\nb")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    assert main([]) == 2
    assert capsys.readouterr() == ("", "error: a b\n")
