"""What the rehearsal counts against the programs that XLA makes, and rehearsals where there is a compiler for TPUs."""

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
import pytest

from experiments.rehearsal import table
from rwkv_jax import hardware, models, optim, parallel, run_config
from rwkv_jax.train import make_init, make_step, rehearse
from rwkv_jax.train.__main__ import main

needs_libtpu = pytest.mark.skipif(
    "TPU_LIBRARY_PATH" not in os.environ, reason="libtpu (Linux on x86-64 only) is installed by `make test-all`"
)
ROOT = Path(__file__).parents[1]
V, D = 512, 128


def _lowered(name, devices=None, replicas=1, accumulation=1, T=128, **fields):
    """(model, shapes of its parameters, step) of one layer: a program says once what its loops do often."""
    B = 16
    model = models.build(name, vocab_size=V, num_layers=1, dim=D, scan=False, remat="block", **fields)
    tx = optim.optimiser()
    raw = make_step(model, tx, accumulation=accumulation)
    init, step, _ = parallel.fsdp(make_init(model, tx), raw, devices, replicas)
    state = jax.eval_shape(init, jax.random.key(0))
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32), "mask": jax.ShapeDtypeStruct((B, T), bool)}
    return model, state.params, step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32))


def _collectives(program):
    """Bytes of the arrays that a program gathers or sums over devices."""
    sizes, found = {"f32": 4, "bf16": 2, "s32": 4}, set()
    for line in program.as_text().splitlines():
        if op := re.search(r" = (\(.*\)|\S+) (all-gather|all-reduce)(?:-start)?\(.*channel_id=(\d+)", line):
            arrays = re.findall(r"\b(f32|bf16|s32)\[([\d,]*)\]", op[1])
            size = sum(sizes[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays)
            found.add((op[2], op[3], size))  # once, though it may come in several pieces
    return sum(size for _, _, size in found)


def test_interconnect_bytes_are_those_of_a_compiled_step():
    """Of four devices each gets three quarters: XLA for CPUs sums whole gradients, but each once."""
    model, params, step = _lowered("transformer")
    counted = _collectives(step.compile())
    within, between = rehearse.interconnect_bytes(model, params)
    assert within == pytest.approx(3 / 4 * counted, rel=0.005)
    assert between == 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_interconnect_bytes_are_those_of_a_step_compiled_for_tpus(accumulation):
    """In bfloat16, but for the head's gradient. With micro-batches the program has a loop, that says once what it
    does, and outside it the gathering of the head."""
    devices = rehearse._devices("v5e", 1, "2x2")
    model, params, step = _lowered("rwkv4", devices, 1, accumulation, dtype="bfloat16")
    with rehearse.uncached():
        counted = _collectives(step.compile())
    within, _ = rehearse.interconnect_bytes(model, params)
    assert within == pytest.approx(3 / 4 * counted, rel=0.02)
    twice, _ = rehearse.interconnect_bytes(model, params, accumulation=2)
    assert twice == pytest.approx(2 * within - 3 / 4 * 2 * V * D)


@pytest.mark.parametrize("replicas, slices, within, between", [
    (1, 1, 3 / 4 * (2 + 1), 0),  # gathered twice, and summed onto four parts
    (2, 1, 1 / 2 * (2 + 1) + 2 * 1 / 2 / 2, 0),  # and parts of a half summed over two replicas
    (4, 1, 2 * 3 / 4, 0),  # not split: summed, and the sum handed to all
    (2, 2, 1 / 2 * (2 + 1), 2 * 1 / 2 / 2),  # the replicas are slices
    (4, 2, 2 * 1 / 2, 2 * 1 / 2 / 2),
])  # fmt: skip
def test_bytes_of_one_weight_among_four_chips_by_hand(replicas, slices, within, between):
    init, _, _ = parallel.fsdp(lambda key: {"w": jnp.zeros((2**14, 4))}, lambda *args: args, None, replicas)
    params = jax.eval_shape(init, jax.random.key(0))
    counted = rehearse.interconnect_bytes(models.build("rwkv4", size="169m"), params, replicas, slices)
    assert counted == pytest.approx((within * 2**18, between * 2**18))


def test_a_step_is_bound_by_the_slowest():
    config = run_config.read("configs/pile.py:169m", ["--config.batch_size=64"])
    model = models.build(**{k: v for k, v in config.model.to_dict().items() if v is not None})
    init, _, _ = parallel.fsdp(make_init(model, optim.optimiser()), lambda *args: args)
    params = jax.eval_shape(init, jax.random.key(0)).params
    chip = hardware.CHIPS["v5p"]
    seconds = rehearse.step_seconds(model, config, params, chip)
    # 16 windows a chip: 6 FLOPs a weight and token, and of layers 2 more
    weights = 6 * 50277 * 768 + 8 * 13 * 768**2 * 12
    assert seconds["compute"] == pytest.approx(weights * 16 * 1024 / 459e12, rel=0.01)
    slow = rehearse.step_seconds(model, config, params, chip._replace(link_rate=1e6))
    assert max(slow, key=slow.get) == "interconnect"


ROW = {
    "batch": [128, 1024], "accumulation": 2, "chips": 8, "slices": 1, "remat": "outputs", "memory_capacity": 2**34,
    "memory": {"parameters": 2**30, "optimiser": 2**31, "gradients": 2**30},
}  # fmt: skip


def test_what_to_change_are_flags_of_this_config():
    config = run_config.read("configs/pile.py:169m", ["--config.loss_chunk=100000", "--config.replicas=2"])
    assert [line.split(":")[0] for line in rehearse.advice(config, ROW)] == [
        "--config.model.remat=block",
        "--config.accumulation=4",
        "--config.loss_chunk=2048",
        "--config.replicas=1",
        "more chips",
        "--config.model.param_dtype=bfloat16",
        "--config.batch_size=64",
    ]
    config = run_config.read("configs/pile.py:169m", ["--config.model.param_dtype=bfloat16"])
    least = ROW | {"remat": "block", "batch": [8, 1024], "accumulation": 1}
    assert rehearse.advice(config, least) == [
        "more chips: parameters, optimiser and gradients alone take 4.0 GiB of each"
    ]


def test_the_page_has_the_table_of_the_committed_rows():
    results = json.loads((ROOT / "experiments/rehearsal/results.json").read_text())
    assert table.render(results) in (ROOT / "docs/scale.md").read_text()
    assert all(row["fits"] and row["bound"] == "compute" for row in results["rows"])  # what the claim says


def _refused(capsys, *arguments):
    assert main([*arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("target", ["v5p", "v5p:4", "v4:2x2x1", "h100:8x8", "v5p:4x4x4x4", "0xv5e:4x4"])
def test_an_unknown_slice_is_one_line(target, capsys):
    expected = (
        f"error: --rehearse is {target!r}, expected one of v5e, v5p, v6e and a shape: v5p:4x4x8, or 2xv5e:16x16\n"
    )
    assert _refused(capsys, "--config=configs/pile.py:169m", f"--rehearse={target}") == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rehearse=v5e:4x4", "--config.batch_size=24"], "batch_size is 24, expected a multiple of 16"),
        (["--rehearse=2xv5e:4x4", "--config.replicas=2", "--config.batch_size=48"], "expected a multiple of 32"),
        (["--rehearse=v5e:4x4", "--config.segments=2"], "expected segments 1"),
        (["--rehearse=v5e:4x4", "--config.strategy=pmap"], "strategy is 'pmap' .* expected fsdp .*replicas=16"),
        (["--rehearse=2xv5e:4x4"], "replicas is 1, expected a multiple of the 2 slices"),
        (["--rehearse=v5e:4x4", "--config.replicas=3"], "replicas is 3, expected a divisor of the 16"),
    ],
)
def test_what_a_slice_cannot_share_is_one_line(flags, message, capsys):
    assert re.search(message, _refused(capsys, "--config=configs/pile.py:169m", *flags))


def test_without_a_compiler_one_line_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    line = _refused(capsys, "--config=configs/pile.py:169m", "--rehearse=v5e:4x4")
    assert line.endswith("expected libtpu (Linux, x86-64): pip install libtpu\n")


def test_a_workdir_is_needed_unless_there_is_a_rehearsal(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--config=configs/tiny.py"])
    assert capsys.readouterr().err.endswith("error: expected --workdir, or --rehearse\n")


SMALL = ["--config=configs/tiny.py", "--config.strategy=fsdp"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target, replicas", [("v5e:2x2", 1), ("2xv5e:2x2", 2)])
def test_a_rehearsal_says_what_a_chip_needs(target, replicas, capsys):
    config = run_config.read("configs/tiny.py", ["--config.strategy=fsdp", f"--config.replicas={replicas}"])
    row = rehearse.rehearse(config, target)
    memory, weights = row["memory"], 4 * row["parameters"]
    assert row["fits"] and row["chips"] == 4 * replicas
    assert weights / 4 <= memory["parameters"] < weights / 3  # small arrays are on every chip
    assert memory["optimiser"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    assert row["memory_needed"] == sum(memory.values()) < 2**30
    assert ("network" in row["seconds"]) == (row["network_bytes"] > 0) == (replicas == 2)
    assert main([*SMALL, f"--config.replicas={replicas}", f"--rehearse={target}"]) == 0
    assert f"on {target}: {row['chips']} chips" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_to_change(capsys):
    large = ["--config.batch_size=4096", "--config.seq_len=4096", "--rehearse=v5e:2x2"]
    assert main([*SMALL, *large]) == 1
    out = capsys.readouterr().out
    needed, capacity = map(float, re.search(r"memory a chip ([\d.]+) GiB of ([\d.]+)", out).groups())
    assert needed > capacity == 16
    assert "does not fit; in this order:\n  --config.model.remat=matmuls" in out


@needs_libtpu
@pytest.mark.slow
def test_a_slice_that_is_not_built_is_one_line(capsys):
    line = _refused(capsys, *SMALL, "--config.batch_size=21", "--rehearse=v5e:3x7")
    assert line.startswith("error: --rehearse: there is no slice v5e:3x7 (")


@needs_libtpu
@pytest.mark.slow
def test_the_experiment_runs_and_makes_no_row_twice(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.rehearsal.run", "--smoke", f"--out={tmp_path}"]
    run = lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "v5e:2x2: 4 chips" in run()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["stamp"]["command"].endswith("--config=configs/tiny.py --config.strategy=fsdp --rehearse=v5e:2x2")
    assert not run()
    assert "| rwkv4 4 x 128, remat none | v5e:2x2, 4 | 16 x 256, 4 |" in table.render({"rows": [row]})
