"""Several hosts on one machine: the processes of one training run, over loopback.

    python -m rwkv_jax.train.launch --hosts=2 --devices=2 -- --config=configs/tiny.py --workdir=runs/two [...]

starts `python -m rwkv_jax.train` with what follows `--`, once a host. SIGINT, SIGTERM and SIGHUP go to all of them as
SIGTERM: they save the same step and end; a second one kills. Where one dies the others are ended, and one line tells
how to resume.

The exit code is 0 if the run ended well or was stopped, otherwise that of the host that failed first: 2 where it has
said what is wrong with its input, 128 + n if signal n killed it.
"""

import argparse
import contextlib
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading

from rwkv_jax import command

LAST_SECONDS = 60  # that a host may take to end after another has


@command.reported()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.train.launch", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--hosts", type=int, required=True, metavar="N", help="processes, 1 or more")
    parser.add_argument("--devices", type=int, metavar="N", help="virtual CPU devices of each; default: what there is")
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENT", help="of python -m rwkv_jax.train")
    args = parser.parse_args(argv)
    if args.hosts < 1 or (args.devices is not None and args.devices < 1):
        parser.error(f"--hosts is {args.hosts} and --devices {args.devices}, expected 1 or more")
    again = [f"--hosts={args.hosts}", *([f"--devices={args.devices}"] if args.devices else []), "--", *args.arguments]
    return _run(args.hosts, args.devices, args.arguments, f"python -m rwkv_jax.train.launch {shlex.join(again)}")


def _run(hosts, devices, arguments, again) -> int:
    address = f"127.0.0.1:{_free_port()}"
    environment = os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": address}
    if devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    processes, followers, ended, signals = [], [], queue.Queue(), []

    def forward(signum, frame):
        signals.append(signum)
        for process in processes:
            process.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)

    # what was ignored before, as a hang-up is under nohup, stays ignored
    heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    old = {s: signal.signal(s, forward) for s in heard}
    try:
        for host in range(hosts):
            where = [f"--coordinator={address}", f"--num_hosts={hosts}", f"--host={host}"]
            # Sessions of their own: what a terminal sends to its foreground comes through `forward` alone.
            process = subprocess.Popen(
                [sys.executable, *_warning_options(), "-m", "rwkv_jax.train", *arguments, *where],
                env=environment,
                start_new_session=True,
                **({"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if host else {}),
            )
            processes.append(process)
            followers.append(threading.Thread(target=_follow, args=(host, process, ended), daemon=True))
            followers[-1].start()
        code, what = _first_failure(hosts, ended)
    finally:
        for process in processes:
            process.kill()
        for follower in followers:
            follower.join(LAST_SECONDS)
        for s, handler in old.items():
            signal.signal(s, handler)
    if code not in (0, 2):
        print(f"{what}; resume with: {again}", file=sys.stderr)
    return code


def _first_failure(hosts, ended):
    """(exit code, what happened) of the host that failed first; (0, "") once all have ended well."""
    left = set(range(hosts))
    while left:
        try:
            host, code = ended.get(timeout=LAST_SECONDS if len(left) < hosts else None)
        except queue.Empty:
            return 1, f"host {min(left)} did not end within {LAST_SECONDS} s of another, and was killed"
        left.discard(host)
        if code > 0:
            return code, f"host {host} ended with exit code {code}"
        if code < 0:
            return 128 - code, f"host {host} was killed by {signal.Signals(-code).name}"
    return 0, ""


def _follow(host, process, ended):
    """Print what a host says, its number before it (the first writes to the terminal itself); tell when it ended."""
    with process.stdout or contextlib.nullcontext(()) as lines:
        for line in lines:
            print(f"host {host}: {line}", end="", file=sys.stderr, flush=True)
    ended.put((host, process.wait()))


def _warning_options():
    return [f"-W{option}" for option in sys.warnoptions]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
