"""Report what is installed and what will run: `python -m rwkv_jax.doctor`, or `rwkv-jax doctor`.

The last line is `RESULT: ok` after a tiny model has trained and decoded, with exit code 0, else `RESULT: failed: ...`
with 1. JAX is imported inside functions: an installation that cannot import it gets a report too.
"""

import glob
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable

import rwkv_jax
from rwkv_jax import command, files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# What is optional, by the name of the extra where there is one: its distribution, and what it is for.
EXTRAS = {
    "datasets": ("datasets", "corpora of the Hugging Face hub, hf:NAME"),
    "harness": ("lm_eval", "lm-evaluation-harness"),
    "tensorboard": ("tensorboardX", "training curves in TensorBoard"),
    "wandb": ("wandb", "training curves in Weights & Biases"),
    "world": ("pyrwkv-tokenizer", "the tokenizer of the World models"),
    "libtpu": ("libtpu", "TPUs, and train --rehearse without one"),
    "torch": ("torch", "only tests that compare with other implementations"),
}
# Device files of an accelerator, and the package that JAX needs for it.
DRIVERS = {"/dev/nvidia[0-9]*": "jax[cuda13]", "/dev/accel[0-9]*": "jax[tpu]", "/dev/vfio/[0-9]*": "jax[tpu]"}
LENGTHS = (1, 1024)  # tokens of a decoding step and of a training window
KERNELS = dict.fromkeys(("tpu", "gpu"), "pallas")  # forms that a caller asks for by another name
BATCH, TOKENS, STEPS = 2, 32, 3  # of the tiny model's training
TOLERANCE = 1e-3  # of decoding against one pass over all tokens, as a share of the largest logit


def report() -> dict:
    """Return JSON values, under "result" "ok" or "failed: ...". A failed part is {"error": its message}."""
    parts = {
        "versions": versions,
        "machine": machine,
        "devices": devices,
        "operators": operators,
        "caches": caches,
        "extras": extras,
        "model": tiny_model,
    }
    found = {name: _tried(part) for name, part in parts.items()}
    errors = [f"{name}: {part['error']}" for name, part in found.items() if "error" in part]
    return found | {"result": f"failed: {errors[0]}" if errors else "ok"}


def _tried(part: Callable[[], dict]) -> dict:
    try:
        return part()
    except Exception as error:  # whatever is wrong with an installation
        told = command.missing_devices(error) or f"{type(error).__name__}: {files.one_line(error)}"
        return {"error": told.removesuffix(": ")}


def versions() -> dict:
    return {"rwkv_jax": rwkv_jax.__version__, "python": platform.python_version()} | {
        name: _version(name) for name in PACKAGES
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": platform.platform(), "executable": sys.executable, "cores": cores, "memory": memory}


def devices() -> dict:
    """Return the kind and number of devices, and bytes of memory of one, None where JAX does not report them.

    "unused" is the package that JAX needs for an accelerator of this machine that it does not use.
    """
    import jax

    first, stats = jax.devices()[0], jax.local_devices()[0].memory_stats() or {}
    by_default = first.platform == "cpu" and not os.environ.get("JAX_PLATFORMS")
    lacking = [package for driver, package in DRIVERS.items() if by_default and glob.glob(driver)]
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
        "memory": stats.get("bytes_limit"),
        "memory_in_use": stats.get("bytes_in_use"),
        "unused": lacking[0] if lacking else None,
    }


def operators() -> dict:
    """Return the forms that the operators take in float32 when none is named, for a value and with gradients, by T."""
    import jax.numpy as jnp

    from rwkv_jax.ops.dispatch import HOPPER, cuda_capability, target_platform
    from rwkv_jax.ops.wkv4 import suited_form as form_of_wkv4
    from rwkv_jax.ops.wkv6 import suited_form as form_of_wkv6
    from rwkv_jax.ops.wkv7 import suited_forms as forms_of_wkv7

    target = target_platform()
    suited = {
        "wkv4": lambda T: (form_of_wkv4(target, T, jnp.dtype("float32")),) * 2,
        "wkv6": lambda T: (form_of_wkv6(T),) * 2,
        "wkv7": lambda T: forms_of_wkv7(target, T),
    }
    forms = {
        name: {T: dict(zip(("forward", "backward"), of(T), strict=True)) for T in LENGTHS}
        for name, of in suited.items()
    }
    return {"platform": target, "hopper": cuda_capability() >= HOPPER, "forms": forms}


def caches() -> dict:
    """Return the path and bytes of the cache of corpora, and of JAX's cache of programs, whose path may be None."""
    import jax

    from rwkv_jax import data

    paths = {"corpora": str(data.cache_dir()), "programs": jax.config.jax_compilation_cache_dir}
    return {name: {"path": path, "bytes": path and files.num_bytes(path)} for name, path in paths.items()}


def extras() -> dict:
    return {
        name: {"version": _version(package), "package": package, "use": use} for name, (package, use) in EXTRAS.items()
    }


def tiny_model() -> dict:
    """Take steps of gradient descent with a tiny model on one batch, then read the batch at once and token by token.

    Raises:
        RuntimeError: the loss has not fallen, or the two ways to read differ.
    """
    import jax
    import numpy as np

    from rwkv_jax.models import build, kinds, parameter_shapes
    from rwkv_jax.train.step import Objective, gradient_of_batch

    began, rng = time.perf_counter(), np.random.default_rng(0)
    model = build(kinds.DEFAULT, vocab_size=256, num_layers=2, dim=64, matmul_precision="highest")
    # Drawn without a program to compile; nothing is zero, as most matrices are at the start of a training run.
    draw = lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
    params = jax.tree.map(draw, parameter_shapes(model))
    tokens = rng.integers(0, 256, (BATCH, TOKENS + 1), dtype=np.int32)
    batch = {"tokens": tokens, "mask": np.ones((BATCH, TOKENS), np.float32)}

    @jax.jit
    def step(params):
        grads, (sums, _) = gradient_of_batch(model, Objective(), params, None, batch, None, None)
        return jax.tree.map(lambda p, g: p - 0.1 * g / sums.count, params, grads), sums.nll / sums.count

    losses = []
    for _ in range(STEPS):
        params, loss = step(params)
        losses.append(float(loss))
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss of the tiny model went from {losses[0]:.3f} to {losses[-1]:.3f}, expected less")

    apply, state, decoded = jax.jit(model.apply), model.init_state(BATCH), []
    at_once, _ = apply({"params": params}, tokens)
    for t in range(tokens.shape[1]):
        logits, state = apply({"params": params}, tokens[:, t : t + 1], state)
        decoded.append(np.asarray(logits))
    error = float(np.abs(np.concatenate(decoded, axis=1) - at_once).max() / np.abs(at_once).max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"logits of the tiny model differ by {error:.1e} between decoding and one pass")
    seconds = time.perf_counter() - began
    return {"name": kinds.DEFAULT, "loss_nats": losses, "decoding_error": error, "seconds": seconds}


@command.reported()
def main(argv=None) -> int:
    parser = command.Parser(
        prog=command.program("rwkv_jax.doctor"),
        description="Report versions, devices, operators, caches and optional packages, and run a tiny model.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in one line")
    as_json = parser.parse_args(argv).json
    found = report()
    print(files.to_json(found) if as_json else _table(found))
    return 0 if found["result"] == "ok" else 1


def _table(found: dict) -> str:
    rows = []
    for name, part in found.items():
        if name != "result":
            rows += [(name, part["error"])] if "error" in part else ROWS[name](**part)
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {text}" for name, text in rows), f"RESULT: {found['result']}"])


def _machine_rows(platform, executable, cores, memory):
    yield "platform", f"{platform}, {cores} cores, {_gib(memory)}"
    yield "executable", executable


def _device_rows(kind, platform, count, hosts, memory, memory_in_use, unused):
    text = f"{count} x {kind}" + (f" on {hosts} hosts" if hosts > 1 else "")
    if memory:
        text += f", {_gib(memory)} of each for JAX, {_gib(memory_in_use or 0)} in use"
    if unused:
        text += f'; an accelerator is not used: pip install "{unused}"'
    yield "devices", text


def _operator_rows(platform, hopper, forms):
    for name, by_length in forms.items():
        texts = []
        for T, of in by_length.items():
            forward, backward = (KERNELS.get(of[way], of[way]) for way in ("forward", "backward"))
            both = forward if forward == backward else f"{forward} forward, {backward} backward"
            texts.append(f"{both} at T {T:,}")
        yield name, "; ".join(texts)
    gpu = " of Hopper or later" if hopper else ""
    yield "chosen for", f"{platform}{gpu}; the reasons are at suited_form in rwkv_jax/ops/wkv*.py"


def _cache_rows(**caches):
    for name, of in caches.items():
        yield f"{name} cache", "not set" if of["path"] is None else f"{of['path']}, {of['bytes'] / 1e6:,.1f} MB"


def _extra_rows(**extras):
    for name, of in extras.items():
        yield name, f"{of['version'] or 'not installed: pip install ' + of['package']} ({of['use']})"


def _model_rows(name, loss_nats, decoding_error, seconds):
    loss = f"loss {loss_nats[0]:.4f} to {loss_nats[-1]:.4f} in {len(loss_nats)} steps"
    yield "tiny model", f"{name}: {loss}; decoding equals one pass to {decoding_error:.0e}; {seconds:.1f} s"


def _version_rows(**versions):
    return ((name, version or "not installed") for name, version in versions.items())


ROWS = {
    "versions": _version_rows,
    "machine": _machine_rows,
    "devices": _device_rows,
    "operators": _operator_rows,
    "caches": _cache_rows,
    "extras": _extra_rows,
    "model": _model_rows,
}


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


if __name__ == "__main__":
    command.end(main())
