"""Several hosts, each a process of the same command: how they find one another, fail together and stop together.

JAX's distributed runtime does the work: a coordinator on host 0, heartbeats, a step at which all know of a signal.
"""

import contextlib
import hashlib
import os
import secrets
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # after which a host that has died or stands still ends the others; JAX's default is 100


def join(distributed: bool, coordinator: str | None, num_hosts: int | None, host: int | None) -> None:
    """Connect this process to the others, before anything else touches a device. Alone: nothing.

    Args:
        distributed: ask the cluster who and where they are (TPU pods, SLURM, Open MPI, Kubernetes, and the variables
            that `jax.distributed.initialize` names).
        coordinator: "address:port" of host 0, as all hosts reach it; with the next two, instead of asking.
        num_hosts: of all.
        host: 0 to num_hosts - 1, this one.

    Raises:
        ValueError: only some of the three are told, they are out of range, or there is no cluster to ask.
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
            f"--distributed found no cluster ({error}); name --coordinator, --num_hosts, --host"
        ) from None
    except RuntimeError as error:
        raise OSError(f"the other hosts were not reached: {error}") from error


@contextlib.contextmanager
def together():
    """What raises ValueError or OSError in here on one host does so on all; no host may leave before the others.

    Nothing in here may wait for another host, which could have failed before.
    """
    mistake = None
    try:
        yield
    except (ValueError, OSError) as error:
        mistake = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(mistake is not None)))
    if mistake:
        raise mistake
    if len(failed):
        raise ValueError(f"host {failed[0]} failed; its own line says why")


def check_same(what: str, value: str) -> None:
    """One line on every host, where they have not all come with the same `value`."""
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    differ = (multihost_utils.process_allgather(digest) != digest).any(axis=-1)
    if differ.any():
        raise ValueError(f"{what} of host {jax.process_index()} differs from that of host {np.argmax(differ)}")


def check_shared(folder) -> None:
    """One line on every host, where `folder` is not the same one for all of them."""
    token = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = folder / f".shared-{token:08x}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("marked")
    missing = np.flatnonzero(~multihost_utils.process_allgather(np.array(mark.exists())))
    if jax.process_index() == 0:
        mark.unlink()
    if len(missing):
        raise ValueError(
            f"{folder} of host {missing[0]} is not that of host 0, expected a folder that all hosts share"
        )


@contextlib.contextmanager
def stop_signals():
    """`stop(steps_taken_here) -> bool`, to be asked once a step: whether SIGINT or SIGTERM asks the run to end.

    On several hosts a signal to any of them counts, and all hear of it at the same step. There, an asynchronous
    protocol of JAX agrees on the step without a collective: asking costs 0.3 µs, where gathering a flag from two
    processes took 4 ms. A second signal interrupts at once.
    """
    stop = threading.Event()
    several = jax.process_count() > 1

    def request(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX listens to, and tells the others

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
