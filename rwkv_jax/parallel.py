"""Strategies: how one step function runs over the devices. Each turns `(init, step)` into `(init, step, put)`:

    init(key) -> state          born where it will live
    put(batch) -> batch         the rows that this host has read (`rows`) onto its devices
    step(state, batch, lr) -> (state, metrics)      state donated

and the training loop never asks which one it has. Outside this file every array is a global `jax.Array` without a
device axis. `step(state, batch, lr, axis_name=None)` reduces over `axis_name` where it is given (pmap), and sees the
global batch otherwise. `devices` are all that there are unless the caller names others, for which a step can be
compiled though they are not here.
"""

import contextlib
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
MIN_SHARDED = 2**14  # elements: smaller leaves cost more to gather than to keep


def single(init, step, devices=None):
    """One device."""
    return jax.jit(init), jax.jit(step, donate_argnums=0), jax.device_put


def data_parallel(init, step, devices=None):
    """`jax.pmap`: parameters replicated, rows of the batch split."""
    mesh = _mesh("pmap", devices)
    mapped = jax.pmap(
        partial(step, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )

    def globally(state, batch, lr):
        # pmap takes and returns what this host holds; of one host these three lines copy and compile nothing
        local = multihost_utils.global_array_to_host_local_array(state, mesh, P())
        state_and_metrics = mapped(local, batch, lr)
        return multihost_utils.host_local_array_to_global_array(state_and_metrics, mesh, P())

    put = lambda batch: jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)
    # placed on the mesh before the first step, or that one would be compiled for one device and the next for all
    return jax.jit(init, out_shardings=NamedSharding(mesh, P())), globally, put


def fsdp(init, step, devices=None):
    """`jax.jit` with every large array split over its largest divisible axis, gathered where it is used."""
    mesh = _mesh("fsdp", devices)
    shardings = jax.tree_util.tree_map_with_path(partial(shard_rule, mesh), jax.eval_shape(init, jax.random.key(0)))
    split = NamedSharding(mesh, P(AXIS))
    jitted = jax.jit(
        step,
        in_shardings=(shardings, split, NamedSharding(mesh, P())),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return (
        jax.jit(init, out_shardings=shardings),
        _under(mesh, jitted),
        partial(jax.tree.map, partial(_assembled, split)),
    )


STRATEGIES = {"single": single, "pmap": data_parallel, "fsdp": fsdp}


def _mesh(strategy, devices=None):
    devices = devices or jax.devices()
    if strategy == "pmap":  # host by host, as its arrays without a device axis need it
        return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    # Auto axes: since jax 0.9 `make_mesh` defaults to Explicit ones, which linen's Dense rejects
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def rows(strategy: str, batch_size: int) -> np.ndarray:
    """Rows of a batch that this host's devices take, ascending: what it has to read. All of them on one host."""
    if strategy == "single":
        return np.arange(batch_size)
    return np.concatenate(
        [np.arange(*bounds) for bounds in _shares(NamedSharding(_mesh(strategy), P(AXIS)), batch_size)]
    )


def _shares(sharding, batch_size):
    """(begin, end) of each run of rows that a device of this host takes, ascending; devices may share one."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({index[0].indices(batch_size)[:2] for index in indices})


def _assembled(sharding, x):
    """The global array of which this host has read its `rows`, `x`."""
    shards = sharding.mesh.size
    at = {begin: i for i, (begin, _) in enumerate(_shares(sharding, shards))}
    size = len(x) // len(at)

    def share(index):
        i = at[(index[0].start or 0) // size]
        return x[i * size : (i + 1) * size]

    return jax.make_array_from_callback((shards * size, *x.shape[1:]), sharding, share)


def shard_rule(mesh, path, x):
    """Sharding of one leaf: its largest axis that the devices divide, never the layer axis of stacked blocks."""
    stacked = any(getattr(p, "key", None) == "blocks" for p in path)
    for axis in sorted(range(int(stacked), len(x.shape)), key=lambda a: -x.shape[a]):
        if x.size >= MIN_SHARDED and x.shape[axis] % mesh.size == 0:
            return NamedSharding(mesh, P(*[None] * axis, AXIS))
    return NamedSharding(mesh, P())


@contextlib.contextmanager
def _rows_split(mesh):
    """The models' logical axis "batch" mapped to the mesh, in what is traced and run here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", AXIS),)):
        yield


def _under(mesh, jitted):
    """`jitted` traced and run with the rows of the batch split."""
    call = _rows_split(mesh)(jitted)
    call.lower = _rows_split(mesh)(jitted.lower)
    return call


def beside_the_step(strategy: str):
    """Context for applying a model outside the step, in evaluation, to what the strategy has placed."""
    return contextlib.nullcontext() if strategy == "single" else _rows_split(_mesh(strategy))


def check_divisible(batch_size: int, accumulation: int, strategy: str) -> None:
    """One line where the batch cannot be split evenly over devices and accumulated micro-batches."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if strategy == "single" and jax.process_count() > 1:
        raise ValueError(f"strategy is 'single', expected pmap or fsdp on {jax.process_count()} hosts")
    devices = 1 if strategy == "single" else jax.device_count()
    if batch_size % (devices * accumulation):
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of {devices * accumulation} "
            f"({devices} devices x {accumulation} accumulated micro-batches)"
        )
