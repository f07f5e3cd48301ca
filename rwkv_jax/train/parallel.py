"""Strategies of running one step function over devices. Each turns `(init, step)` into `(init, step, put)`:

    init(key) -> state          created with its final sharding
    put(batch) -> batch         the rows that this host has read (`own_rows`), placed on its devices
    step(state, batch, lr) -> (state, metrics)      state donated

The training loop does not depend on the strategy. A state's `carry`, the recurrent state of the batch's rows, is split
by rows too. Outside this file every array is a global `jax.Array` without a device axis. `step(state, batch, lr,
axis_name=None)` reduces over `axis_name` where it is given (pmap), and sees the global batch otherwise.
"""

import contextlib
import math
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
REPLICA, FSDP = "replica", "fsdp"
MIN_SHARDED = 2**14  # elements: smaller leaves cost more to gather than to keep


def single(init, step, replicas=1):
    """JAX's default device, `jax.default_device`."""

    def committed(key):
        # like restored and pretrained arrays: a step that gets both kinds is compiled twice
        device = jax.config.jax_default_device
        device = jax.devices(device)[0] if device is None or isinstance(device, str) else device
        return jax.jit(init, out_shardings=jax.sharding.SingleDeviceSharding(device))(key)

    return committed, jax.jit(step, donate_argnums=0), jax.device_put


def data_parallel(init, step, replicas=1):
    """`jax.pmap`: parameters replicated, rows of the batch split."""
    mesh = _mesh("pmap")
    by_rows = NamedSharding(mesh, P(AXIS))

    def on_a_device(state, carry, batch, lr):
        state, values = step(state.replace(carry=carry), batch, lr, axis_name=AXIS)
        return state.replace(carry=None), state.carry, values

    mapped = jax.pmap(
        on_a_device,
        axis_name=AXIS,
        in_axes=(None, 0, 0, None),
        out_axes=(None, 0, None),
        devices=list(mesh.devices.flat),
        donate_argnums=(0, 1),
    )

    def globally(state, batch, lr):
        # pmap takes and returns this host's arrays; on a single host these lines copy and compile nothing
        here = partial(multihost_utils.global_array_to_host_local_array, global_mesh=mesh)
        back = partial(multihost_utils.host_local_array_to_global_array, global_mesh=mesh)
        carry = put(here(state.carry, pspecs=P(AXIS)))
        state, carry, values = mapped(here(state.replace(carry=None), pspecs=P()), carry, batch, lr)
        state, values = back((state, values), pspecs=P())
        carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
        return state.replace(carry=back(carry, pspecs=P(AXIS))), values

    put = lambda batch: jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), batch)
    # placed on the mesh now: otherwise the first step is compiled for one device and the next for all
    like = jax.eval_shape(init, jax.random.key(0))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P()), like)
    shardings = shardings.replace(carry=jax.tree.map(lambda x: by_rows, like.carry))
    return jax.jit(init, out_shardings=shardings), globally, put


def fsdp(init, step, devices=None, replicas=1):
    """`jax.jit` with every large array split over its largest divisible axis, gathered where it is used.

    The devices are a mesh (replica, fsdp): rows are split over both, arrays over `fsdp`, so that they are gathered
    among the devices of one replica and only gradients are summed over replicas. `devices` may be absent from this
    machine: the step can then be compiled, not run.
    """
    mesh = _mesh("fsdp", devices, replicas)
    shardings = jax.tree_util.tree_map_with_path(partial(shard_rule, mesh), jax.eval_shape(init, jax.random.key(0)))
    split = _split(mesh)
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


def _mesh(strategy, devices=None, replicas=1):
    devices = devices or jax.devices()
    # Auto axes: since jax 0.9 `make_mesh` defaults to Explicit ones, which linen's Dense rejects
    if strategy == "pmap":  # ordered by host, as its arrays without a device axis require
        return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    return Mesh(_grid(devices, replicas), (REPLICA, FSDP), axis_types=(AxisType.Auto,) * 2)


def _grid(devices, replicas):
    """Devices [replica, fsdp], neighbours in the network side by side.

    A slower network joins slices, so a replica spans as few as possible: with as many replicas as slices, weights are
    gathered within a slice.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    apart = math.gcd(replicas, slices)  # replicas that share no slice
    slow = (apart, slices // apart)
    fast = (replicas // apart, len(devices) // replicas // slow[1])
    if slices == 1:
        return mesh_utils.create_device_mesh(fast, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(fast, slow, devices, allow_split_physical_axes=True)


def _split(mesh):
    """Rows over every device."""
    return NamedSharding(mesh, P(mesh.axis_names))


def own_rows(strategy: str, batch_size: int, replicas: int = 1) -> np.ndarray:
    """Rows of a batch that this host reads for its devices, ascending; all of them on a single host."""
    if strategy == "single":
        return np.arange(batch_size)
    return np.concatenate(
        [np.arange(*bounds) for bounds in _shares(_split(_mesh(strategy, replicas=replicas)), batch_size)]
    )


def _shares(sharding, batch_size):
    """(begin, end) of each run of rows that a device of this host takes, ascending; devices may share one."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({index[0].indices(batch_size)[:2] for index in indices})


def _assembled(sharding, x):
    """The global array, given the `own_rows` of this host, `x`."""
    shards = sharding.mesh.size
    at = {begin: i for i, (begin, _) in enumerate(_shares(sharding, shards))}
    size = len(x) // len(at)

    def share(index):
        i = at[(index[0].start or 0) // size]
        return x[i * size : (i + 1) * size]

    return jax.make_array_from_callback((shards * size, *x.shape[1:]), sharding, share)


def shard_rule(mesh, path, x):
    """Sharding of one leaf: along its largest axis that the devices of a replica divide, never that of stacked layers.
    The carry is split by rows."""
    if getattr(path[0], "name", None) == "carry":
        return _split(mesh)
    stacked = any(getattr(p, "key", None) == "blocks" for p in path)
    for axis in sorted(range(int(stacked), len(x.shape)), key=lambda a: -x.shape[a]):
        if x.size >= MIN_SHARDED and x.shape[axis] % mesh.shape[FSDP] == 0:
            return NamedSharding(mesh, P(*[None] * axis, FSDP))
    return NamedSharding(mesh, P())


@contextlib.contextmanager
def _rows_split(mesh):
    """Map the models' logical axis "batch" to the mesh in code traced and run in this context."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", mesh.axis_names),)):
        yield


def _under(mesh, jitted):
    """`jitted`, traced and run with the rows of the batch split."""
    call = _rows_split(mesh)(jitted)
    call.lower = _rows_split(mesh)(jitted.lower)
    return call


def beside_the_step(strategy: str, replicas: int = 1):
    """Context for applying a model outside the step, in evaluation, to arrays that the strategy placed."""
    return contextlib.nullcontext() if strategy == "single" else _rows_split(_mesh(strategy, replicas=replicas))


def check_divisible(
    batch_size: int, accumulation: int, strategy: str, replicas: int = 1, devices: int | None = None
) -> None:
    """Raise ValueError unless replicas divide the devices, and devices times micro-batches the batch."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if strategy == "single" and jax.process_count() > 1:
        raise ValueError(f"strategy is 'single', expected pmap or fsdp on {jax.process_count()} hosts")
    devices = 1 if strategy == "single" else devices or jax.device_count()
    if replicas > 1 and strategy != "fsdp":
        raise ValueError(f"replicas is {replicas}, expected 1 with strategy {strategy!r}")
    if devices % replicas:
        raise ValueError(f"replicas is {replicas}, expected a divisor of the {devices} devices")
    if batch_size % (devices * accumulation):
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of {devices * accumulation} "
            f"({devices} devices x {accumulation} accumulated micro-batches)"
        )
