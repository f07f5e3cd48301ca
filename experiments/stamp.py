"""The stamp of every result: its command, commit, versions, hardware and date."""

import importlib.metadata
import itertools
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")


def stamp() -> dict:
    """Return command, commit (with "+" for a dirty tree), date, versions, processor, XLA flags and devices."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return {
        "command": " ".join(["python -m", module.name if module else sys.argv[0], *_arguments()]),
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": [d.device_kind for d in jax.devices()],
    }


def commit(folder: Path) -> str:
    """Return the commit of the checkout that contains a folder, with "+" for a dirty tree."""
    git = lambda *args: subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")


def _arguments() -> list[str]:
    """Return the arguments of the command without `--out`, which no number depends on."""
    before = ["", *sys.argv[1:]]
    return [x for last, x in itertools.pairwise(before) if last != "--out" and x.partition("=")[0] != "--out"]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
