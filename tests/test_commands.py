"""Early ends of commands, and that every command of the package handles them."""

import argparse
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import rwkv_jax
from rwkv_jax import command, data, generate
from rwkv_jax.__main__ import VERBS
from rwkv_jax.__main__ import main as by_verb

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
        (
            BrokenPipeError(32, "Broken pipe"),
            2,
            "error: [Errno 32] Broken pipe",
        ),  # a socket: stdout is open
        (MemoryError("Unable to allocate 8 GiB"), 2, "error: out of memory; lower b: Unable to allocate 8 GiB"),
        (jax.errors.JaxRuntimeError(f"{ON_A_DEVICE}\nmore"), 2, f"error: out of memory; lower b: {ON_A_DEVICE}"),
        (ValueError(ON_A_DEVICE), 2, f"error: out of memory; lower b: {ON_A_DEVICE}"),  # as libraries wrap it
        (OSError(12, "Cannot allocate"), 2, "error: out of memory; lower b: [Errno 12] Cannot allocate"),
    ],
)
def test_reported_command_ends_with_one_line_and_an_exit_code(error, code, line, capsys):
    assert ended(error, capsys, interrupted="kept", out_of_memory="lower b") == (code, f"{line}\n")


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: a"), KeyError("a"), OverflowError("a")])
def test_reported_command_raises_errors_that_are_not_the_users(error, capsys):
    with pytest.raises(type(error)):
        ended(error, capsys)


def test_reported_command_returns_its_own_exit_code():
    assert [command.reported()(lambda argv: argv)(code) for code in (None, 0, 1, 130)] == [0, 0, 1, 130]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reported_command_is_silent_when_its_reader_is_gone(unbuffered):
    program = "import sys; from rwkv_jax import command; sys.exit(command.reported()(print)())"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_reported_command_names_missing_devices(monkeypatch, capsys):
    def devices():
        raise cause

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(AssertionError):  # the devices are available
        ended(AssertionError(), capsys)
    monkeypatch.setattr(jax, "devices", devices)
    for cause in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")):
        wrapped = ValueError("a.pth: its fields are not those of a model")
        wrapped.__cause__ = cause
        for error in (cause, wrapped):
            line = "error: JAX_PLATFORMS is 'cuda', but JAX finds no such device\n"
            assert ended(error, capsys) == (2, line)
    assert ended(ValueError("a"), capsys) == (2, "error: a\n")


def test_command_end_keeps_its_code_when_its_output_is_closed():
    program = f"{sys.executable} -c 'from rwkv_jax import command; command.end(2)'"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        assert subprocess.run(f"{program} {closed}", shell=True).returncode == 2


@pytest.mark.parametrize(
    "name, functions, shared",
    [("generate", (generate.decode.checked_draws, generate.sampler), 11), ("data", (data.prepare,), 3)],
)
def test_command_and_functions_have_the_same_defaults(name, functions, shared, monkeypatch):
    def parse(parser, *args):
        found.update({action.dest: action.default for action in parser._actions if action.option_strings})
        raise OSError

    found = {}
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    importlib.import_module(f"rwkv_jax.{name}.__main__").main([])
    expected = {key: p.default for f in functions for key, p in inspect.signature(f).parameters.items()}
    both = found.keys() & {key for key, default in expected.items() if default is not inspect.Parameter.empty}
    assert len(both) == shared and {key: found[key] for key in both} == {key: expected[key] for key in both}


COMPILE_FOR_SECONDS = """
import os, signal, threading
import jax, jax.numpy as jnp
from rwkv_jax import command

def deep(x):
    for i in range(150):
        x = jax.lax.scan(lambda c, _: (jnp.tanh(c * 1.1 + i), None), x, None, length=3)[0] @ x
    return x

@command.reported()
def main(argv):
    lowered = jax.jit(deep).lower(jnp.ones((8, 8)))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()

command.end(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_command_interrupted_while_xla_compiles_ends_in_one_line(attempt):
    process = subprocess.run([sys.executable, "-c", COMPILE_FOR_SECONDS], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command_line, imported",
    [
        ("-m rwkv_jax.interop", "rwkv_jax"),
        ("-m rwkv_jax.train", "rwkv_jax"),
        *(
            (command_line, name)
            for command_line in ("-m rwkv_jax train", "rwkv-jax train")
            for name in ("rwkv_jax", "numpy")
        ),
    ],
)
def test_command_interrupted_during_imports_ends_in_one_line(command_line, imported, script):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    program = [sys.executable, "-X", "importtime", *command_line.replace("rwkv-jax", str(script)).split()]
    with subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.rstrip().endswith(f" {imported}"):  # other imports take seconds
                process.send_signal(signal.SIGINT)
                break
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, rest) == (130, ["stopped\n"])


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_main_of_every_command_is_reported(path, monkeypatch, capsys):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    main = importlib.import_module(name).main

    def parse(*args):
        raise OSError("a\nb")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    assert main([]) == 2
    assert capsys.readouterr() == ("", "error: a b\n")
    assert path.read_text().endswith("    command.end(main())\n")


def test_every_command_has_a_verb():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in COMMANDS}
    assert modules - {"rwkv_jax.__main__"} == {module for module, _ in VERBS.values()}


@pytest.mark.parametrize("verb", VERBS)
def test_verb_is_the_command_of_its_module_under_another_name(verb, monkeypatch, capsys):
    module = VERBS[verb][0].removesuffix(".__main__")
    for path, name in (
        ("/opt/bin/rwkv-jax", f"rwkv-jax {verb}"),
        ("/opt/rwkv_jax/__main__.py", f"python -m {module}"),
    ):
        monkeypatch.setattr(sys, "argv", [path, verb, "--help"])
        with pytest.raises(SystemExit, match="0"):
            by_verb()
        assert capsys.readouterr().out.startswith(f"usage: {name} [-h] ")


def test_verb_is_given_the_rest_of_the_arguments_and_gives_its_exit_code(tmp_path, capsys):
    assert by_verb(["convert", str(tmp_path / "absent"), str(tmp_path / "m.pth")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/absent: no such file or folder")


@pytest.mark.parametrize("arguments, names", [(["trian"], "'trian'"), ([], "VERB"), (["-x", "train"], "VERB")])
def test_unknown_verb_is_one_line(arguments, names, capsys):
    assert by_verb(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and names in err and err.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_options_of_a_verb_are_one_line(verb, capsys):
    assert by_verb([verb, "--no-such-option"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_interrupt_handler_is_replaced_while_a_verb_is_imported(monkeypatch):
    handlers = []

    def imported(name):
        handlers.append(signal.getsignal(signal.SIGINT))
        return SimpleNamespace(main=command.reported()(lambda argv: handlers.append(signal.getsignal(signal.SIGINT))))

    monkeypatch.setattr(importlib, "import_module", imported)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert by_verb(["train"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [command.end_while_importing, signal.default_int_handler]


HELP_AND_MODULES = """
import contextlib, sys
from rwkv_jax.__main__ import main

with contextlib.suppress(SystemExit):
    main(["--help"])
print("modules:", *sys.modules)
"""


def test_help_of_the_verbs_imports_the_standard_library_alone():
    program = [sys.executable, "-c", HELP_AND_MODULES]
    out = subprocess.run(program, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout
    shown, _, modules = out.partition("modules: ")
    ours = {name for name in modules.split() if name.partition(".")[0] == "rwkv_jax"}
    assert ours == {"rwkv_jax", "rwkv_jax.__main__", "rwkv_jax.command"}
    assert not {"jax", "flax", "numpy"} & set(modules.split())
    assert [line.split()[0] for line in shown.splitlines() if re.match(r"    \w", line)] == list(VERBS)


@pytest.fixture
def script(tmp_path):
    """What pip writes for [project.scripts] of pyproject.toml."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    ((name, entry),) = project["project"]["scripts"].items()
    module, _, function = entry.partition(":")
    path = tmp_path / name
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return path


def test_script_and_package_give_the_same_exit_code_and_output(script):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    for program in (["-m", "rwkv_jax"], [str(script)]):
        for arguments, code, out in ((["trian"], 2, ""), (["--version"], 0, f"rwkv-jax {rwkv_jax.__version__}\n")):
            process = subprocess.run(
                [sys.executable, *program, *arguments], env=environment, capture_output=True, text=True
            )
            assert (process.returncode, process.stdout) == (code, out)
            assert process.stderr.count("\n") == (code == 2)


def test_main_of_every_experiment_script_is_reported():
    """Two scripts are excepted: one is run by a measurement, the other by a person who chooses a rate."""
    folder = PACKAGE.parent / "experiments"
    scripts = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py")}
    scripts = {name: text for name, text in scripts.items() if '__name__ == "__main__"' in text}
    ends = r"\n    (end\((command\.)?main|study\.main|redraw|print_table)\([^\n]*\n$"
    assert len(scripts) > 30
    assert {n for n, text in scripts.items() if not re.search(ends, text)} == {
        "speed/startup.py",
        "context/copying.py",
    }
    undecorated = [n for n, text in scripts.items() if "    end(main())" in text and "@reported(" not in text]
    assert undecorated == ["trajectory/run.py"]  # calls `command.main`
