"""Several hosts on one machine: the processes of one training run, over loopback.

    python -m rwkv_jax.train.launch --hosts=2 --devices=2 -- --config=configs/tiny.py --config.strategy=fsdp \\
        --workdir=runs/two

starts `python -m rwkv_jax.train` with what follows `--`, once a host. SIGINT, SIGTERM and SIGHUP go to all of them as
SIGTERM: they save the same step and end; a second signal kills them. If one fails, the others are killed.

The exit code is 0 if the run ended well or was stopped, otherwise that of the host that failed first: 2 if it
reported an error in its input, 128 + n if signal n killed it.
"""

import os
import signal
import socket
import subprocess
import sys

from rwkv_jax import command


@command.reported()
def main(argv=None) -> int:
    parser = command.Parser(
        prog=command.program("rwkv_jax.train.launch"), description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--hosts", type=int, required=True, metavar="N", help="processes, 1 or more")
    parser.add_argument("--devices", type=int, metavar="N", help="virtual CPU devices of each; default: what there is")
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENT", help="of python -m rwkv_jax.train")
    args = parser.parse_args(argv)
    if args.hosts < 1 or (args.devices is not None and args.devices < 1):
        parser.error(f"--hosts is {args.hosts} and --devices {args.devices}, expected 1 or more")

    address = f"127.0.0.1:{_free_port()}"
    environment = os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": address}
    if args.devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    processes, signals = [], []

    def forward(signum, frame):
        signals.append(signum)
        for process in processes:
            process.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)

    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(s) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(s, forward)
    try:
        for host in range(args.hosts):
            where = [f"--coordinator={address}", f"--num_hosts={args.hosts}", f"--host={host}"]
            # Own sessions: signals from the terminal reach the hosts through `forward` alone.
            process = subprocess.Popen(
                [sys.executable, "-m", "rwkv_jax.train", *args.arguments, *where],
                env=environment,
                start_new_session=True,
            )
            processes.append(process)
        return _first_failure(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _first_failure(processes) -> int:
    """The exit code of the host that fails first, or 0 once all have ended well."""
    hosts = {process.pid: host for host, process in enumerate(processes)}
    for _ in processes:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            name = signal.Signals(-code).name
            print(f"host {hosts[pid]} was killed by {name}; the same command resumes", file=sys.stderr)
            return 128 - code
        if code:
            return code
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    command.end(main())
