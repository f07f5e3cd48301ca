"""Training the released sizes on one accelerator: tokens/s, share of the data sheet's peak, and memory.

Each row is `configs/pile.py` at one size and batch, on random tokens, with the remat policy and the form of WKV that
it names. A transformer of the same size is measured too. All programs are compiled before the first is timed, because
compiling autotunes kernels on the GPU. A row that does not fit says so.

    python -m experiments.speed.pile [--smoke] [--only=169m,3b] [--seconds=180] [--out=DIR]

Writes DIR/pile.json. Cost: 4 minutes on an H100. `--smoke` is for CPUs: tiny models, numbers without meaning.
"""

import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import stamp
from experiments.results import write_json
from rwkv_jax import files, hardware, train
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import to_json, user_path
from rwkv_jax.train import optim, run_config

#         size, batch, tokens per row, fields of the model
ROWS = (
    ("169m", 32, 1024, {"remat": "outputs"}),
    ("169m", 32, 1024, {"remat": "none"}),
    ("169m", 32, 1024, {"remat": "block"}),
    ("169m", 32, 1024, {"remat": "outputs", "wkv_impl": "associative"}),
    ("169m", 32, 1024, {"remat": "outputs", "name": "transformer"}),
    ("430m", 32, 1024, {"remat": "outputs"}),
    ("1b5", 16, 1024, {"remat": "outputs"}),
    ("3b", 8, 1024, {"remat": "block"}),
    ("169m", 1, 32768, {"remat": "outputs"}),
    ("169m", 1, 32768, {"remat": "outputs", "name": "transformer"}),
    ("169m", 1, 262144, {"remat": "block"}),
)
STEPS, SMOKE_STEPS = 12, 2  # timed, after two warm-up steps


def build(size, fields, smoke):
    config = run_config.read(f"configs/pile.py:{size}", [])
    config.unlock()
    config.model.update(fields)
    if smoke:
        config.model.update(num_layers=2, dim=64, vocab_size=256, wkv_impl=None)
    return run_config.model_of(config)


def compiled(size, batch, seq_len, fields, smoke) -> dict:
    """Return the model, its jitted init, and the compiled step for one device."""
    start = time.perf_counter()
    model, tx = build(size, fields, smoke), optim.optimiser()
    init = jax.jit(train.make_init(model, tx))
    shapes = {
        "tokens": jax.ShapeDtypeStruct((batch, seq_len + 1), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, seq_len), jnp.bool_),
    }
    step = jax.jit(train.make_step(model, tx), donate_argnums=0)
    state, lr = jax.eval_shape(init, jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)
    step = step.lower(state, shapes, lr).compile()
    return {"model": model, "init": init, "step": step, "compile_seconds": time.perf_counter() - start}


def measure(batch, seq_len, steps, model, init, step, compile_seconds) -> dict:
    """Return the speed and memory of one compiled step."""
    rng = np.random.default_rng(0)
    draw = lambda: {
        "tokens": jnp.array(rng.integers(0, model.vocab_size, (batch, seq_len + 1)), jnp.int32),
        "mask": jnp.ones((batch, seq_len), bool),
    }
    batches, lr, seconds = [draw() for _ in range(4)], np.float32(1e-4), []
    state = init(jax.random.key(0))
    for i in range(steps + 2):
        start = time.perf_counter()
        state, values = step(state, batches[i % len(batches)], lr)
        loss = float(values["loss_nats"])
        seconds.append(time.perf_counter() - start)
    memory, took = step.memory_analysis(), statistics.median(seconds[2:])
    speed, peak = batch * seq_len / took, hardware.peak_flops(jax.devices()[0])
    flops = hardware.flops_per_token(model, seq_len)
    return {
        "compile_seconds": compile_seconds,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "step_seconds": took,
        "tokens_per_second": speed,
        "mfu": peak and speed * flops / peak,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "loss_nats": loss,
    }


@reported()
def main(argv=None) -> int:
    parser = Parser(prog="python -m experiments.speed.pile", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", help="sizes, such as 169m,3b")
    parser.add_argument("--seconds", type=float, default=180, help="start no row after this time")
    parser.add_argument("--out", type=user_path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    files.check_output_folder(args.out)
    wanted = [row for row in ROWS if not args.only or row[0] in args.only.split(",")]
    if args.smoke:
        wanted = [(size, 2, min(seq_len, 128), fields) for size, _, seq_len, fields in wanted[::4]]

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(compiled, *row, args.smoke) for row in wanted]
        wait(waiting)
    began, rows = time.perf_counter(), []
    for size, batch, seq_len, fields in wanted:
        found, program = {"size": size, "batch": batch, "seq_len": seq_len, **fields}, waiting.pop(0)
        try:
            if time.perf_counter() - began > args.seconds:
                raise TimeoutError("no time left")
            found |= measure(batch, seq_len, SMOKE_STEPS if args.smoke else STEPS, **program.result())
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            found |= {"left_out": " ".join(str(error).split())[:300]}
        del program  # frees the memory of its step
        gc.collect()
        rows.append(found)
        print(to_json({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}), flush=True)
        write_json(args.out / "pile.json", {"rows": rows, "stamp": stamp.stamp()})
    return 0


if __name__ == "__main__":
    end(main())
