"""Several hosts, each a process of the same command: they connect, fail together and stop together.

JAX's distributed runtime does the work: a coordinator on host 0, heartbeats, a step at which all act on a signal.
"""

import contextlib
import hashlib
import itertools
import os
import secrets
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rwkv_jax import command

STOPPING = b"stopping: the current step finishes, compiling included, and is saved; Ctrl-C again stops at once\n"
HEARTBEAT_SECONDS = 30  # without a heartbeat of a host, after which the others end; JAX's default is 100

_meetings = itertools.count()


def join(distributed: bool, coordinator: str | None, num_hosts: int | None, host: int | None) -> None:
    """Connect this process to the others, before anything else touches a device; a no-op without arguments.

    Args:
        distributed: detect the hosts (TPU pods, SLURM, Open MPI, Kubernetes, and the variables
            that `jax.distributed.initialize` names).
        coordinator: "address:port" of host 0, as all hosts reach it; with the next two, instead of detection.
        num_hosts: number of hosts.
        host: this one, 0 to num_hosts - 1.

    Raises:
        ValueError: only some of the three are given, they are out of range, or no cluster is found.
        OSError: the others were not reached within five minutes.
    """
    told = {"coordinator": coordinator, "num_hosts": num_hosts, "host": host}
    missing = [f"--{name}" for name, value in told.items() if value is None]
    if len(missing) == len(told) and not distributed:
        return
    if missing and not distributed:
        raise ValueError(f"{' and '.join(missing)} missing: expected --coordinator, --num_hosts and --host together")
    if distributed and len(missing) < len(told):
        raise ValueError("expected --distributed, or --coordinator, --num_hosts and --host, not both")
    if not distributed:
        _, _, port = coordinator.rpartition(":")
        if not port.isdecimal():
            raise ValueError(f"--coordinator is {coordinator!r}, expected address:port of host 0")
        if not 0 <= host < num_hosts:
            raise ValueError(f"--host is {host}, expected 0 to {num_hosts - 1} for --num_hosts={num_hosts}")
    try:
        jax.distributed.initialize(
            *told.values(),
            cluster_detection_method=None if distributed else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster ({error}); pass --coordinator, --num_hosts, --host"
        ) from None
    except RuntimeError as error:
        raise OSError(f"the other hosts were not reached: {error}") from error
    jax.devices()  # waits two minutes for the other hosts: now, before one of them reads a long text


class SharedError(ValueError):
    """An error that all hosts raise at the same point, so that they shut down cleanly. `host` prints it."""

    def __init__(self, message: str, host: int):
        super().__init__(message)
        self.host = host


@contextlib.contextmanager
def together():
    """Turn a ValueError or OSError of one host into a `SharedError` on each. A single host raises it unchanged.

    In this context hosts may take up to a day, but must not wait for one another.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    mistake = None
    try:
        yield
    except (ValueError, OSError) as error:
        mistake = error
    # CPU collectives time out after 30 s, and a host may read a long text
    ocp.multihost.get_barrier_sync_fn()(key=f"together {next(_meetings)}", timeout_ms=24 * 3600 * 1000)
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(mistake is not None)))
    if len(failed):
        raise SharedError(str(mistake or f"host {failed[0]} failed; its own error says why"), failed[0]) from mistake


def check_joined() -> None:
    """Raise ValueError where JAX sees several hosts, as on a TPU pod, that are not connected."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(f"this is one of {jax.process_count()} hosts, expected --distributed on each")


def check_same(what: str, value: str) -> None:
    """Raise ValueError unless all hosts have the same `value`."""
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    differ = (multihost_utils.process_allgather(digest) != digest).any(axis=-1)
    with together():
        if differ.any():
            raise ValueError(f"{what} of host {jax.process_index()} differs from that of host {np.argmax(differ)}")


def check_shared(folder) -> None:
    """Raise ValueError unless `folder` is the same one for all hosts."""
    token = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = folder / f".shared-{token:08x}"
    first_host = jax.process_index() == 0
    with together():
        if first_host:
            mark.touch()
    try:
        with together():
            if not mark.exists():
                me = jax.process_index()
                raise ValueError(
                    f"{folder} of host {me} is not that of host 0, expected a folder that all hosts share"
                )
    finally:
        if first_host:
            mark.unlink()


@contextlib.contextmanager
def stop_signals():
    """Yield `stop(steps_taken_here) -> bool`, called once a step: True if SIGINT or SIGTERM asks the run to end.

    On several hosts a signal to any of them counts, and all see it at the same step. An asynchronous protocol of JAX
    agrees on the step without a collective: a call costs 0.3 µs; gathering a flag from two processes took 4 ms. A
    second SIGINT interrupts at once; on a single host, a second SIGTERM too.
    """
    stop = threading.Event()
    several = jax.process_count() > 1

    def request(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        os.write(command.STDERR, STOPPING)  # unbuffered: at once, whatever else is printing
        stop.set()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX listens for it, and tells the others

    asked = multihost_utils.reached_preemption_sync_point if several else lambda steps: stop.is_set()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old = {s: signal.signal(s, request) for s in ([signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM])}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
