"""Rehearsals: bytes and times against programs compiled by XLA, mistakes, and runs with libtpu."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from small import shapes_of

from experiments.rehearsal import table
from rwkv_jax import hardware, models
from rwkv_jax.train import make_init, make_step, optim, parallel, rehearse, run_config
from rwkv_jax.train.__main__ import main

needs_libtpu = pytest.mark.skipif(
    "TPU_LIBRARY_PATH" not in os.environ, reason="libtpu (Linux on x86-64 only) is installed by `make test-all`"
)
ROOT = Path(__file__).parents[2]
SMALL = ["--config=configs/tiny.py", "--config.strategy=fsdp"]


def _collectives(program):
    """Bytes of the arrays that a program gathers or sums over devices."""
    sizes, found = {"f32": 4, "bf16": 2, "s32": 4}, set()
    for line in program.as_text().splitlines():
        if op := re.search(r" = (\(.*\)|\S+) (all-gather|all-reduce)(?:-start)?\(.*channel_id=(\d+)", line):
            arrays = re.findall(r"\b(f32|bf16|s32)\[([\d,]*)\]", op[1])
            size = sum(sizes[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays)
            found.add((op[2], op[3], size))  # counted once, even if it comes in several pieces
    return sum(size for _, _, size in found)


def test_interconnect_bytes_equal_those_of_a_compiled_step():
    """Each of four devices receives three quarters. XLA for CPUs sums whole gradients, each of them once."""
    B, T, V, D = 16, 128, 512, 128
    fields = {
        "vocab_size": V,
        "num_layers": 1,
        "dim": D,
        "scan": False,
    }  # a program shows a loop body once
    model = models.build("transformer", remat="block", **fields)
    tx = optax.identity()  # an optimiser moves no bytes, and takes half of the time to compile
    init, step, _ = parallel.fsdp(make_init(model, tx), make_step(model, tx))
    state = jax.eval_shape(init, jax.random.key(0))
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32), "mask": jax.ShapeDtypeStruct((B, T), bool)}
    counted = _collectives(step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)).compile())
    params = state.params
    within, between = rehearse.interconnect_bytes(model, params)
    assert within == pytest.approx(3 / 4 * counted, rel=0.005)
    assert between == 0
    # In bfloat16 all but the head's gradient halves.
    # Each micro-batch gathers and sums again, but for the head's weight.
    half, _ = rehearse.interconnect_bytes(model.clone(dtype="bfloat16"), params)
    assert half == pytest.approx(within / 2 + 3 / 4 * 2 * V * D)
    twice, _ = rehearse.interconnect_bytes(model, params, accumulation=2)
    assert twice == pytest.approx(2 * within - 3 / 4 * 4 * V * D)


@pytest.mark.parametrize("replicas, slices, within, between", [
    (1, 1, 3 / 4 * (2 + 1), 0),  # gathered twice, and summed onto four parts
    (2, 1, 1 / 2 * (2 + 1) + 2 * 1 / 2 / 2, 0),  # and parts of a half summed over two replicas
    (4, 1, 2 * 3 / 4, 0),  # not split: summed, and the sum handed to all
    (2, 2, 1 / 2 * (2 + 1), 2 * 1 / 2 / 2),  # the replicas are slices
    (4, 2, 2 * 1 / 2, 2 * 1 / 2 / 2),
])  # fmt: skip
def test_interconnect_bytes_of_one_weight_on_four_chips_agree_by_hand(replicas, slices, within, between):
    init, _, _ = parallel.fsdp(lambda key: {"w": jnp.zeros((2**14, 4))}, lambda *args: args, None, replicas)
    params = jax.eval_shape(init, jax.random.key(0))
    counted = rehearse.interconnect_bytes(models.build("rwkv4", size="169m"), params, replicas, slices)
    assert counted == pytest.approx((within * 2**18, between * 2**18))


def test_step_seconds_follow_the_data_sheet():
    config = run_config.read("configs/pile.py:169m", ["--config.batch_size=64"])
    model = run_config.model_of(config)
    init, _, _ = parallel.fsdp(make_init(model, optim.optimiser()), lambda *args: args)
    params = jax.eval_shape(init, jax.random.key(0)).params
    chip, tokens = hardware.CHIPS["v5p"], 16 * 1024  # a chip: 16 windows
    seconds = rehearse.step_seconds(model, config, params, chip)
    # 6 FLOPs a weight and token, and of layers 2 more
    weights = 6 * 50277 * 768 + 8 * 13 * 768**2 * 12
    assert seconds["compute"] == pytest.approx(weights * tokens / 459e12, rel=0.01)
    # 7 float32 numbers for each of a quarter of the parameters, 3 bfloat16 for each of all, and activations
    num_params = 2 * 50277 * 768 + 13 * 768**2 * 12
    activations = 2 * tokens * (120 * 768 * 12 + 6 * 50277)
    assert seconds["memory"] == pytest.approx((7 * num_params + 6 * num_params + activations) / 2765e9, rel=1e-3)
    within, _ = rehearse.interconnect_bytes(model, params)
    assert seconds["interconnect"] == within / 600e9 and len(seconds) == 3
    config.replicas = 2
    _, between = rehearse.interconnect_bytes(model, params, replicas=2, slices=2)
    assert rehearse.step_seconds(model, config, params, chip, slices=2)["network"] == between / 6.25e9


def test_rehearsal_table_of_the_committed_rows_is_in_docs_scale():
    results = json.loads((ROOT / "experiments/rehearsal/results.json").read_text())
    assert table.render(results) in (ROOT / "docs/scale.md").read_text()
    assert all(row["fits"] and row["bound"] == "compute" for row in results["rows"])  # the claim of the page


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "target, flags, message",
    [
        ("v5p", [], "--rehearse is 'v5p', expected one of v5e, v5p, v6e and a shape: v5p:4x4x8, or 2xv5e:16x16"),
        ("h100:8x8", [], "--rehearse is 'h100:8x8', expected one of"),
        ("v5e:4x4", ["batch_size=24"], "batch_size is 24, expected a multiple of 16"),
        ("2xv5e:4x4", ["replicas=2", "batch_size=48"], "expected a multiple of 32"),
        ("v5e:4x4", ["segments=2"], "expected segments 1"),
        ("v5e:4x4", ["strategy=pmap"], "strategy is 'pmap' .* expected fsdp .*replicas=16"),
        ("2xv5e:4x4", [], "replicas is 1, expected a multiple of the 2 slices"),
    ],
)
def test_rehearse_names_a_batch_that_a_slice_cannot_share(target, flags, message, monkeypatch):
    monkeypatch.setattr(rehearse, "_devices", None)  # refused before the compiler is needed
    config = run_config.read("configs/pile.py:169m", [f"--config.{flag}" for flag in flags])
    with pytest.raises(ValueError, match=message):
        rehearse.rehearse(config, target)


def _refused(capsys, *arguments):
    """The one line on stderr of a command that ends with exit code 2."""
    assert main([*arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


def test_rehearse_without_libtpu_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    line = _refused(capsys, "--config=configs/pile.py:169m", "--rehearse=v5e:4x4")
    assert line.endswith("expected libtpu (Linux, x86-64): pip install libtpu\n")


@needs_libtpu
@pytest.mark.slow
def test_rehearse_names_a_slice_that_does_not_exist(capsys):
    line = _refused(capsys, *SMALL, "--config.batch_size=21", "--rehearse=v5e:3x7")
    assert line.startswith("error: --rehearse: there is no slice v5e:3x7 (")


# ------------------------------------------------------------------------------------------ with libtpu


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, target, replicas, order",
    [
        ("rwkv4", "v5e:2x2", 1, "packed"),
        ("rwkv4", "2xv5e:2x2", 2, "shuffled"),
        *((name, "v5e:2x2", 1, "shuffled") for name in ("rwkv5", "rwkv6", "rwkv7")),
    ],
)
def test_rehearse_reports_the_memory_of_a_chip(name, target, replicas, order):
    flags = ["--config.strategy=fsdp", f"--config.replicas={replicas}", f"--config.data.order={order}"]
    config = run_config.read(f"configs/tiny.py:{name}", flags)
    row = rehearse.rehearse(config, target)
    memory, weights = row["memory"], 4 * row["parameters"]
    assert row["fits"] and row["chips"] == 4 * replicas
    sizes = [x.size for x in jax.tree.leaves(shapes_of(run_config.model_of(config)))]
    whole = 4 * sum(size for size in sizes if size < parallel.MIN_SHARDED)
    assert memory["parameters"] == (weights - whole) / 4 + whole
    assert memory["optimiser"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    bytes_a_token = 6 if order == "packed" else 5  # a token's id, whether it counts, and if a document starts there
    assert memory["batch"] == config.batch_size // row["chips"] * (bytes_a_token * config.seq_len + 4)
    assert row["memory_needed"] == sum(memory.values()) < 2**30
    assert ("network" in row["seconds"]) == (row["network_bytes"] > 0) == (replicas == 2)
    assert f"on {target}: {row['chips']} chips" in rehearse.table(row)


@needs_libtpu
@pytest.mark.slow
def test_rehearse_ends_with_exit_code_1_if_the_step_does_not_fit(capsys):
    large = ["--config.batch_size=4096", "--config.seq_len=4096", "--rehearse=v5e:2x2"]
    assert main([*SMALL, *large]) == 1
    out = capsys.readouterr().out
    needed, capacity = map(float, re.search(r"memory a chip ([\d.]+) GiB of ([\d.]+)", out).groups())
    assert needed > capacity == 16
    assert out.splitlines()[-1].startswith("does not fit: ")


@needs_libtpu
@pytest.mark.slow
def test_rehearsal_experiment_computes_each_row_once(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.rehearsal.run", "--smoke", f"--out={tmp_path}"]
    run = lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "v5e:2x2: 4 chips" in run()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["stamp"]["command"].endswith("--config=configs/tiny.py --config.strategy=fsdp --rehearse=v5e:2x2")
    assert not run()
    assert "| rwkv4 4 x 128, remat none | v5e:2x2, 4 | 16 x 256, 4 |" in table.render({"rows": [row]})
