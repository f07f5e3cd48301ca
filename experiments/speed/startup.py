"""Startup time: seconds of tracing, lowering and compiling, and of whole commands up to their first result.

Each measurement has its own process, so that only Python's byte code is cached. Tracing and lowering run in every
round, and their median is reported; compiling runs once. With `--against=PATH`, a checkout of an earlier commit,
everything is measured there too, in turn with ours.

    git worktree add runs/8d922b8 8d922b8
    python -m experiments.speed.run --suite=startup --against=runs/8d922b8
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
SIZES = {"6 x 512": (6, 512, 256), "12 x 768": (12, 768, 50277)}
SMOKE_SIZES = {"2 x 16": (2, 16, 256)}
LAYOUTS = {"stacked": True, "unstacked": False}
PROGRAMS = ("training step", "prompt", "decode step")
PROMPT, BATCH, WINDOW = 256, 4, 512  # tokens of a prompt; rows and tokens of a training step
ROUNDS = 3
WORLD_VOCAB = 65536
SIZE_OF_COMMANDS, SMOKE_SIZE_OF_COMMANDS = (12, 768), (2, 64)
TEXT = "The Eiffel tower is in the city of"
PACKAGE = """
import sys
from rwkv.model import RWKV
from rwkv.utils import PIPELINE, PIPELINE_ARGS
model = RWKV(model=sys.argv[1], strategy="cpu fp32", verbose=False)
print(PIPELINE(model, "rwkv_vocab_v20230424").generate(sys.argv[2], 1, PIPELINE_ARGS(temperature=1.0, top_p=1.0)))
"""


def run(smoke: bool = False, against: Path | None = None) -> dict:
    """Return the rows of programs and of commands, in seconds."""
    from experiments import stamp  # imported here, because this file also runs in the other checkout

    sides = {"ours": ROOT} | ({"before": against.resolve()} if against else {})
    rounds = 1 if smoke else ROUNDS
    rows = []
    cells = list(itertools.product(SMOKE_SIZES if smoke else SIZES, LAYOUTS, PROGRAMS))
    for size, layout, program in tqdm(cells, desc="programs"):
        times = {side: [] for side in sides}
        for i, (side, root) in itertools.product(range(rounds), sides.items()):
            once = ["--compile"] if i == 0 else []  # once, because compiling takes longest
            printed = _output(root, [__file__, size, layout, program, *once])
            times[side].append(json.loads(printed.splitlines()[-1]))
        medians = {side: _medians(taken) for side, taken in times.items()}
        rows.append({"size": size, "layout": layout, "program": program, **medians})
    return {
        "rows": rows,
        "commands": commands(sides, smoke, rounds),
        "prompt": PROMPT,
        "window": [BATCH, WINDOW],
        "against": against and stamp.commit(against),
    }


def report(results: dict) -> list[str]:
    """Return one line per row."""
    lines = []
    for row in results["rows"]:
        told = "; ".join(
            f"{side} " + ", ".join(f"{name} {t:.2f} s" for name, t in row[side].items())
            for side in ("ours", "before")
            if side in row
        )
        lines.append(f"{row['program']}, {row['size']}, {row['layout']}: {told}")
    for row in results["commands"]:
        lines.append(f"{row['what']}: " + ", ".join(f"{side} {t:.1f} s" for side, t in row["seconds"].items()))
    return lines


def _medians(taken: list[dict]) -> dict:
    return {name: statistics.median(times[name] for times in taken if name in times) for name in taken[0]}


# ---------------------------------------------------------------------------------------------- commands


def commands(sides: dict, smoke: bool, rounds: int) -> list[dict]:
    """Return the wall time of whole commands, from the shell to their first result."""
    layers, dim = SMOKE_SIZE_OF_COMMANDS if smoke else SIZE_OF_COMMANDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        _write_model(path, layers, dim)
        generate = ["-m", "rwkv_jax.generate", f"--model={path}", f"--prompt={TEXT}", "--max_new_tokens=1"]
        to_a_token = {side: partial(_wall, root, generate) for side, root in sides.items()}
        to_a_token["rwkv package"] = partial(_wall, ROOT, ["-c", PACKAGE, str(path.with_suffix("")), TEXT])
        runs = {
            f"generate, one token from a {layers} x {dim} World model": to_a_token,
            "train with configs/tiny.py, to the first logged step": {
                side: partial(_first_step, root) for side, root in sides.items()
            },
        }
        return [{"what": what, "seconds": _in_turn(of_sides, rounds, what)} for what, of_sides in runs.items()]


def _in_turn(runs, rounds, what):
    times = {side: [] for side in runs}
    for _ in tqdm(range(rounds + 1), desc=what):  # the first round warms the file system's caches
        for side, taken in runs.items():
            times[side].append(taken())
    return {side: statistics.median(taken[1:]) for side, taken in times.items()}


def _write_model(path, layers, dim):
    import jax
    import jax.numpy as jnp

    import rwkv_jax

    model = rwkv_jax.build("rwkv4", vocab_size=WORLD_VOCAB, num_layers=layers, dim=dim)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rwkv_jax.save(path, model, params)


def _environment(root):
    """Return the environment variables without JAX's own, such as a cache of compiled programs."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    settings = {"JAX_PLATFORMS": "cpu", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    return own | {"PYTHONPATH": str(root)} | settings


def _output(root, arguments) -> str:
    """Return the standard output of Python with the package in `root`."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=_environment(root), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:200]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _wall(root, arguments) -> float:
    began = time.perf_counter()
    _output(root, arguments)
    return time.perf_counter() - began


def _first_step(root) -> float:
    """Return the seconds from the shell to the row of the first step in metrics.jsonl; the corpus stays cached."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        flags = ["--config=configs/tiny.py", f"--workdir={log.parent}", "--config.log_every=1"]
        command = [sys.executable, "-m", "rwkv_jax.train", *flags]
        outputs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        began = time.perf_counter()
        run = subprocess.Popen(command, cwd=root, env=_environment(root), **outputs)
        try:
            while not (log.exists() and '"step": 1,' in log.read_text()):
                if run.poll() is not None:
                    raise RuntimeError(f"training ended with {run.returncode}: {run.stderr.read()[-2000:]}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            run.kill()
            run.communicate()


# ---------------------------------------------------------------------------------------------- programs


def measured(size, layout, program, compile) -> dict:
    """Return the seconds of tracing, lowering and optionally compiling a program, from shapes."""
    import jax

    function, operands = _program(size, layout, program)
    # warm up what JAX and linen do once per process
    jax.jit(jax.grad(lambda x: jax.lax.scan(lambda c, t: (c * t, None), x, x[None])[0].sum())).lower(operands[-1])
    began = time.perf_counter()
    traced = function.trace(*operands)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    taken = {"trace": traced_at - began, "lower": lowered_at - traced_at}
    if compile:
        lowered.compile()
        taken["compile"] = time.perf_counter() - lowered_at
    return taken


def _program(size, layout, program):
    """Return (jitted function, shapes of its operands, a float array last)."""
    import jax
    import jax.numpy as jnp

    import rwkv_jax
    from rwkv_jax.train import optim
    from rwkv_jax.train.step import make_init, make_step

    layers, dim, vocab_size = (SIZES | SMOKE_SIZES)[size]
    model = rwkv_jax.build("rwkv4", vocab_size=vocab_size, num_layers=layers, dim=dim, scan=LAYOUTS[layout])
    shape = jax.ShapeDtypeStruct
    if program == "training step":
        tx = optim.optimiser()
        state = jax.eval_shape(make_init(model, tx), jax.random.key(0))
        batch = {"tokens": shape((BATCH, WINDOW + 1), jnp.int32), "mask": shape((BATCH, WINDOW), bool)}
        return jax.jit(make_step(model, tx), donate_argnums=0), (state, batch, shape((), jnp.float32))
    T = PROMPT if program == "prompt" else 1
    params = jax.eval_shape(model.init, jax.random.key(0), shape((1, 1), jnp.int32))["params"]
    state = jax.eval_shape(lambda: model.init_state(1))

    def read(params, tokens_BT, state, valid_BT, scale):
        x_BTD, state = model.apply({"params": params}, tokens_BT, state, valid_BT=valid_BT, method="hidden")
        return scale * model.apply({"params": params}, x_BTD[:, -1], method="logits"), state

    return jax.jit(read), (params, shape((1, T), jnp.int32), state, shape((1, T), bool), shape((), jnp.float32))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take one measurement in this process, as the suite does.")
    for name in ("size", "layout", "program"):
        parser.add_argument(name)
    parser.add_argument("--compile", action="store_true")
    print(json.dumps(measured(**vars(parser.parse_args()))))
