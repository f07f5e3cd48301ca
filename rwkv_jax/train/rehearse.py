"""Compile a training step for absent TPUs, and report its memory and a lower bound on its time.

    python -m rwkv_jax.train --config=configs/pile.py:14b --rehearse=v5p:4x4x8        (2xv5e:16x16: two slices)

XLA's own compiler for TPUs (`pip install libtpu`) compiles the whole sharded step and plans the memory of a chip.
Times are rooflines, from data sheets (`hardware.CHIPS`) and the counts below. No machine reaches them.
"""

import contextlib
import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from rwkv_jax import hardware
from rwkv_jax.train import optim, parallel, run_config
from rwkv_jax.train.methods import method_of
from rwkv_jax.train.step import make_init, make_step

TARGETS = ("v5e", "v5p", "v6e")  # which have one device a chip
PILE_TOKENS = 332.1e9  # one epoch, which the released Pile models saw (Table 3)
# Without these variables libtpu queries the machine for a long time. Their values do not change the result.
ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def rehearse(config, target: str) -> dict:
    """Return the memory and time of a step of `config` on `target`, such as "v5p:4x4x8", a slice of 128 chips.

    Returns:
        JSON values, sizes in bytes a chip, times in seconds. `memory` has `parameters`, `optimiser`, `batch`,
        `gradients` as counted, and `activations`: the rest of XLA's plan, with gathered weights and the program.
        `fits` is false where the plan exceeds the memory of a chip.

    Raises:
        ValueError: an unknown slice, no compiler for it, or a batch that it cannot split evenly.
    """
    kind, slices, shape = _parsed(target)
    chip, num_chips = hardware.CHIPS[kind], slices * math.prod(map(int, shape.split("x")))
    if config.segments > 1 or config.carry_state:
        raise ValueError("--rehearse supports whole windows only, expected segments 1 and carry_state False")
    if config.strategy != "fsdp" or config.finetune.method != "full":
        raise ValueError(
            f"strategy is {config.strategy!r} and finetune.method {config.finetune.method!r}, expected fsdp (pmap is "
            f"--config.strategy=fsdp --config.replicas={num_chips}) and full"
        )
    if config.replicas % slices:
        raise ValueError(
            f"replicas is {config.replicas}, expected a multiple of the {slices} slices: otherwise weights are "
            f"gathered over the network between them"
        )
    model = run_config.check(config, num_chips)
    o = config.optim
    tx = optim.optimiser(tuple(o.betas), o.eps, o.weight_decay, o.clip, o.groups)
    options = {"method": method_of(config), "accumulation": config.accumulation}
    step = make_step(model, tx, l2wrap=o.l2wrap, loss_chunk=config.loss_chunk, **options)
    devices = _devices(kind, slices, shape)
    init, step, _ = parallel.fsdp(make_init(model, tx), step, devices, config.replicas)
    state = jax.eval_shape(init, jax.random.key(0))
    B, T = config.batch_size, config.seq_len
    mask_BT = jax.ShapeDtypeStruct((B, T), bool)
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32), "mask": mask_BT}
    if config.data.order in ("packed", "documents"):
        batch["reset"] = mask_BT
    memory = {
        "parameters": _share(state.params),
        "optimiser": _share(state.opt_state),
        "batch": sum(x.size * x.dtype.itemsize for x in batch.values()) // num_chips,
        "gradients": _share(state.params, 4),
    }
    began = time.perf_counter()
    name = f"{config.model.name} {model.num_layers} x {model.dim}"
    print(f"compiling {name} for {target}: minutes", file=sys.stderr, flush=True)
    temporaries, fits = _temporaries(step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)))
    memory["activations"] = max(0, temporaries - memory["gradients"])
    seconds = step_seconds(model, config, state.params, chip, slices)
    bound = max(seconds, key=seconds.get)
    flops = hardware.flops_per_token(model, T) * B * T
    within, between = interconnect_bytes(model, state.params, config.replicas, slices, config.accumulation)
    return {
        "target": target,
        "chips": num_chips,
        "slices": slices,
        "model": name,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "batch": [B, T],
        "accumulation": config.accumulation,
        "replicas": config.replicas,
        "remat": model.remat,
        "fits": fits,
        "memory": memory,
        "memory_needed": sum(memory.values()),
        "memory_capacity": chip.memory,
        "flops": flops,
        "interconnect_bytes": within,
        "network_bytes": between,
        "seconds": seconds,
        "bound": bound,
        "tokens_per_second": B * T / seconds[bound],
        "mfu": flops / (seconds[bound] * num_chips * chip.flops),
        "days_to_pile": PILE_TOKENS / (B * T / seconds[bound]) / 86400,
        "compiler": devices[0].client.platform_version.splitlines()[-1],
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def step_seconds(model, config, params, chip: hardware.Chip, slices: int = 1) -> dict:
    """Lower bounds on the time of a step: "compute", "memory", "interconnect" and, of several slices, "network".

    Compute: the FLOPs of `hardware`. Memory, at least: the optimiser reads and writes parameters and two moments and
    reads gradients, the products read gathered weights three times a micro-batch, and a layer's activations pass
    through memory `Kind.memory_traffic` D times a token (RWKV-4: 120, 20 in and out of its products, as much again
    between them, three times over for forward, backward and weight gradient), and logits 6 V times a token. XLA's
    count, which includes fast on-chip memory, is 286 D (one layer of D 768 without remat on 8 windows of 1,024 a chip,
    bfloat16, v5e; libtpu 0.0.52, 2026-11-26).
    """
    num_chips = _mesh_of(params).size
    tokens, size = config.batch_size * config.seq_len / num_chips, jnp.dtype(model.dtype).itemsize
    num_params = sum(x.size for x in jax.tree.leaves(params))
    within, between = interconnect_bytes(model, params, config.replicas, slices, config.accumulation)
    executed = hardware.flops_per_token(model, config.seq_len) + hardware.recomputed_flops_per_token(model)
    moved = 7 * _share(params, 4) + 3 * size * num_params * config.accumulation
    traffic = sum(kind.memory_traffic * model.dim for _, kind, _ in model.every_layer)
    moved += (traffic + 6 * model.vocab_size) * size * tokens
    seconds = {
        "compute": executed * tokens / chip.flops,
        "memory": moved / chip.memory_rate,
        "interconnect": within / chip.link_rate,
    }
    return seconds | ({"network": between / chip.network_rate} if slices > 1 else {})


def interconnect_bytes(model, params, replicas=1, slices=1, accumulation=1) -> tuple[float, float]:
    """Bytes that reach a chip in a step: from its own slice, and over the network from other slices.

    A micro-batch gathers each split weight of a layer twice within a replica, forward and backward, and the embedding
    once; a step gathers the head once. A micro-batch reduce-scatters gradients within a replica and sums them over
    replicas: first within a slice, then between slices. Everything has the dtype of the activations, except the
    head's gradient, float32.

    Args:
        params: shapes, as `parallel.fsdp` splits them; `replicas` is a multiple of `slices`.
    """
    num_chips = _mesh_of(params).size
    chips, split = num_chips // slices, num_chips // replicas
    others = lambda n: (n - 1) / n  # of an array in n parts, the fraction on other chips
    gathered = summed = 0
    for path, x in jax.tree.leaves_with_path(params):
        part, narrow = path[0].key, x.size * jnp.dtype(model.dtype).itemsize
        if not x.sharding.is_fully_replicated:
            gathered += {"emb": accumulation, "head": 1}.get(part, 2 * accumulation) * narrow
        summed += accumulation * (4 * x.size if part == "head" else narrow)
    # over n chips, a reduce-scatter brings (n - 1) / n of an array to each, an all-reduce twice that
    within = others(split) * (gathered + summed) + 2 * others(chips // split) * summed / split
    return within, 2 * others(slices) * summed / chips


def table(row: dict) -> str:
    """Format the numbers of `rehearse` for a terminal."""
    giga, (B, T), seconds = lambda x: f"{x / 2**30:.2f}", row["batch"], row["seconds"]
    parts = ", ".join(f"{name} {giga(size)}" for name, size in row["memory"].items())
    moved = f"{row['interconnect_bytes'] / 1e9:,.1f} GB into each chip"
    if "network" in seconds:
        moved += f", {row['network_bytes'] / 1e9:,.2f} GB from other slices"
    bounds = ", ".join(f"{name} {x:.3f}" for name, x in seconds.items())
    lines = [
        f"{row['model']}, {row['parameters'] / 1e6:,.0f} M parameters, on {row['target']}: {row['chips']} chips",
        f"batch         {B} x {T}: {B // row['chips']} rows a chip, micro-batches {row['accumulation']}, "
        f"replicas {row['replicas']}, remat {row['remat']}",
        f"memory a chip {giga(row['memory_needed'])} GiB of {giga(row['memory_capacity'])}: {parts}",
        f"a step        {row['flops'] / 1e12:,.0f} TFLOP in all, {moved}",
        f"seconds       {bounds}: {seconds[row['bound']]:.3f}, bound by {row['bound']}, if all overlaps; "
        f"{sum(seconds.values()):.3f} if nothing does",
        f"at best       {row['tokens_per_second']:,.0f} tokens/s, {row['tokens_per_second'] / row['chips']:,.0f} a "
        f"chip, {100 * row['mfu']:.0f} % MFU; {PILE_TOKENS / 1e9:.0f} G tokens in {row['days_to_pile']:.1f} days",
    ]
    if not row["fits"]:
        lines.append("does not fit: docs/scale.md lists the flags with which a step needs less")
    return "\n".join(lines)


def _parsed(target):
    """(kind of chip, number of slices, shape of each) of "v5p:4x4x8" or "2xv5e:16x16"."""
    parsed = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):(\d+(?:x\d+){1,2})", target)
    if not parsed or parsed[2] not in TARGETS:
        raise ValueError(
            f"--rehearse is {target!r}, expected one of {', '.join(TARGETS)} and a shape: v5p:4x4x8, or 2xv5e:16x16"
        )
    return parsed[2], int(parsed[1] or 1), parsed[3]


def _devices(kind, slices, shape):
    library = os.environ.get("TPU_LIBRARY_PATH") or str(Path(sys.prefix) / "tpu/libtpu/libtpu.so")  # see Makefile
    if Path(library).is_file():
        os.environ["TPU_LIBRARY_PATH"] = library
    elif importlib.util.find_spec("libtpu") is None:
        raise ValueError("--rehearse needs the compiler for TPUs, expected libtpu (Linux, x86-64): pip install libtpu")
    os.environ |= {name: value for name, value in ABSENT.items() if name not in os.environ}
    try:
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", num_slices=slices).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--rehearse: there is no slice {kind}:{shape} ({str(error).splitlines()[0]})") from None


def _share(tree, itemsize: int | None = None) -> int:
    """Bytes of a tree of shapes on one chip, `itemsize` an element instead of its dtype's."""
    on_chip = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return sum(math.prod(on_chip(x)) * (itemsize or x.dtype.itemsize) for x in jax.tree.leaves(tree))


def _mesh_of(params):
    return jax.tree.leaves(params)[0].sharding.mesh


def _temporaries(lowered) -> tuple[int, bool]:
    """Bytes that a program needs beside its arguments, as XLA counts them, and whether they fit a chip."""
    try:
        with uncached():
            analysis = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"temporaries \(([\d.]+)([KMG])\) exceeds available HBM", str(error))
        if not needed:
            raise
        return round(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]]), False
    return analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes, True


@contextlib.contextmanager
def uncached():
    """Disable JAX's compilation cache, which cannot read back programs for absent machines."""
    wanted = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it reads the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", wanted)
        compilation_cache.reset_cache()
