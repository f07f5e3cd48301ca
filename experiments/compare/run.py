"""RWKV-4 and RWKV-7 against a transformer of equal size, and against that transformer with RWKV's token shift.

Claim: none. At equal size, on the same batches and each at its own learning rate, the table gives the difference of
every model from both transformers, in bits per byte of held-out text, with 95 % intervals over files. It demonstrates
one budget of tokens and one seed. Such small byte-level runs measure the effect of token shift more than that of
recurrence against attention, and the paper's difference at 12 x 512 has the other sign (+0.041 bits per character,
RWKV-4 worse; Table 5).

    make compare                                      (DURATION=minutes, SEED=, TEXT=file or folder)
    python -m experiments.compare.run --duration=6
    python -m experiments.compare.run --sweep         learning rates of each arm and width -> sweep.json
    python -m experiments.compare.run --smoke --out=DIR

Cost: `--duration` minutes, by default 6, on any machine: the run takes the steps that fit. `--sweep`: hours on 2
cores. Writes results.json and figure.png beside this file; the trained models stay in runs/compare/<arm>.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

import rwkv_jax
from experiments import stamp, statistics, sweeps
from experiments.compare import baselines, plot, table
from experiments.measures import bits_per_byte, capped, held_out, level
from experiments.results import write_json
from experiments.runs import trained
from experiments.speed import decode
from experiments.study import MODELS
from rwkv_jax import data, evaluate, files, hardware, train
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.data import batches
from rwkv_jax.files import user_path
from rwkv_jax.models.kinds import kind_of_model
from rwkv_jax.runs import describe
from rwkv_jax.train import metrics, optim, run_config

HERE = Path(__file__).parent
ARMS = ("rwkv4", "rwkv7", "transformer", "transformer+shift")


@dataclass(frozen=True)
class Preset:
    num_layers: int = 4
    dim: int = 128
    seq_len: int = 256
    batch_size: int = 16
    test_bytes: int = 2**17
    contexts: tuple = (256, 4096, 65536)
    decoded: int = 32  # tokens timed at each context


SMOKE = Preset(num_layers=2, dim=32, seq_len=64, batch_size=4, test_bytes=2**12, contexts=(64, 512), decoded=4)
SWEPT = (*ARMS, "rwkv5", "rwkv6")  # default rates come from this sweep too, see `Kind.learning_rates`
SWEEP_WIDTHS, SWEEP_STEPS = ((64, 2), (128, 4), (256, 6)), 160
# Time besides training: compiling, in seconds, then evaluation and decoding, in steps of every arm that take as long
# (measured on two machines, one three times as fast as the other).
COMPILING_SECONDS, OTHER_STEPS = 25, 50
CALIBRATION = 6  # steps
BASELINES = ("transformer", "transformer+shift")


def arm_config(arm, preset, steps, seed=0, text="stdlib", lr=None):
    """Return the training config of one arm."""
    config = run_config.default()
    config.model.update(MODELS[arm]["model"], num_layers=preset.num_layers, dim=preset.dim)
    config.update(corpus=text, steps=steps, seed=seed, seq_len=preset.seq_len, batch_size=preset.batch_size)
    config.update(log_every=max(1, min(10, steps // 20)), eval_every=0, eval_tokens=0, save_every=0)
    config.optim.lr = lr or sweeps.best(HERE / "sweep.json", f"{arm} {preset.num_layers}x{preset.dim}")
    return config


def steps_that_fit(seconds, preset, seed, text, batches_in_epoch) -> int:
    """Return the steps that all arms can take in `seconds` together, including evaluation and decoding.

    Each arm runs a few steps for this estimate. The result is at most an epoch, and at least 20.
    """
    per_step = 0.0
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as workdir:
            train.run(arm_config(arm, preset, CALIBRATION, seed, text), workdir)
            row = metrics.logged(Path(workdir) / "metrics.jsonl")[-1]
        per_step += preset.batch_size * preset.seq_len / row["tokens_per_second"]
    return int(max(20, min((seconds / per_step - OTHER_STEPS) // 10 * 10, batches_in_epoch)))


def train_arm(arm, config, workdir):
    """Train an arm; return (model, params, logged rows). Only a complete run replaces the one in `workdir`."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir.parent) as beside:
        state = train.run(config, Path(beside) / arm)
        if int(state.step) < config.steps:
            raise KeyboardInterrupt
        shutil.rmtree(workdir, ignore_errors=True)
        (Path(beside) / arm).rename(workdir)
    rows = [r for r in metrics.logged(workdir / "metrics.jsonl") if "loss_nats" in r]
    return describe(workdir), state.params, rows


def decode_cost(model, params, contexts, decoded) -> list[dict]:
    """Return tokens/s and state bytes of one stream after contexts of several lengths, with caches full of noise.

    RWKV's state has the same size after all of them: its rows differ by timing noise alone.
    """
    model, params = model.clone(scan=False), rwkv_jax.unstack(params)
    rows = []
    for context in contexts:
        # one cache size for all contexts, so that decoding compiles once: its cost is that of the filled part
        state = decode.filled(model.init_state(1, max_length=max(contexts) + 3 * decoded))
        held = decode.state_bytes(state, context)
        state, token_B1, times = decode.at_context(state, context), np.zeros((1, 1), np.int32), []
        for _ in range(3):  # the first may compile
            start = time.perf_counter()
            token_B1, state = jax.block_until_ready(decode.greedy(model, params, state, token_B1, decoded))
            times.append(time.perf_counter() - start)
        rows.append({"context": context, "tokens_per_second": decoded / min(times[1:]), "state_bytes": held})
    return rows


def counted_baselines(rows_NT, test):
    """Return the nats of each test byte under n-grams of the training bytes, and the bits per byte that xz adds."""
    tokens = np.asarray(test.tokens)
    bits = baselines.ngram_bits(rows_NT, tokens)
    nats = {"unigram": bits[0] * np.log(2), f"{baselines.ORDER}-gram": bits[-1] * np.log(2)}
    xz = baselines.xz_bits_per_byte(rows_NT[:, :-1].tobytes(), np.delete(tokens, test.starts).tobytes())
    return nats, xz


def compare(preset, minutes, seed, text, models):
    """Train and measure all arms; return the numbers of the table and the figure as one JSON object."""
    began = time.perf_counter()
    clock = lambda: f"{time.perf_counter() - began:3.0f} s of about {60 * minutes:.0f} s"
    say = lambda what: print(f"[{clock()}] {what}", file=sys.stderr, flush=True)

    say(f"corpus {text}")
    corpus = data.prepare(text, "bytes")
    test = capped(corpus.test, preset.test_bytes)
    shape = {"seq_len": preset.seq_len, "batch_size": preset.batch_size}
    stream = batches.dataset(corpus.train.tokens, **shape, seed=seed)
    epoch = (len(corpus.train.tokens) - 1) // preset.seq_len // preset.batch_size
    say("peak of the machine, and how many steps fit")
    peak = hardware.matmul_peak()
    steps = steps_that_fit(60 * minutes - COMPILING_SECONDS, preset, seed, text, epoch)
    seen_NT = np.concatenate([stream[i]["tokens"] for i in range(steps)]).astype(np.uint8)
    tokens = steps * preset.batch_size * preset.seq_len

    arms, nats = {}, {}
    for arm in ARMS:
        config = arm_config(arm, preset, steps, seed, text)
        say(f"{arm}: {steps} steps, {tokens:,} tokens")
        model, params, rows = train_arm(arm, config, models / arm)
        say(f"{arm}: held-out text")
        args = (model, params, test.tokens)
        nats[arm] = evaluate.windows(*args, **shape)
        best = evaluate.best_practice(*args, test.starts, **shape)
        say(f"{arm}: decoding")
        flops = hardware.flops_per_token(model, preset.seq_len)
        speed = float(np.median([r["tokens_per_second"] for r in rows if r["tokens_per_second"]]))
        arms[arm] = {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "flops_per_token": flops,
            "lr": max(r["lr"] for r in rows),
            "bits_per_byte": level(nats[arm], test),
            "best_practice_bits_per_byte": level(best, test),
            "tokens_per_second": speed,
            "share_of_peak": speed * flops / peak,
            "decode": decode_cost(model, params, preset.contexts, preset.decoded),
            "curve": [[r["tokens"], r["train_seconds"], round(r["bits_per_byte"], 4)] for r in rows],
        }
    for arm in arms:
        arms[arm]["minus"] = {other: difference(nats[arm], nats[other], test) for other in BASELINES}
    say("n-grams and xz")
    counted, xz = counted_baselines(seen_NT, test)
    results = {
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "test_bytes": test.num_bytes},
        "documents": len(test.starts),
        "preset": {**vars(preset), "steps": steps, "tokens": tokens, "seed": seed},
        "matmul_peak_flops": peak,
        "arms": arms,
        "counted": {name: level(n, test) for name, n in counted.items()} | {"xz": xz},
        "wall_seconds": time.perf_counter() - began,
    }
    return results | {"stamp": stamp.stamp()}


def difference(a_N, b_N, test) -> dict:
    """Return bits per byte of nats `a_N` minus those of `b_N`, and the interval over documents, None for a few.

    The difference is paired because text that is hard for one model is hard for the other.
    """
    (a_D, bytes_D), (b_D, _) = evaluate.per_document(a_N, test), evaluate.per_document(b_N, test)
    has_text = bytes_D > 0
    nats_D, bytes_D = (a_D - b_D)[has_text], bytes_D[has_text]
    low, high = (None if np.isnan(x) else x for x in statistics.over_documents([nats_D], bytes_D))
    return {"bits_per_byte": evaluate.bits_per_byte(nats_D, bytes_D), "low": low, "high": high}


def sweep(path):
    """Sweep the learning rates of every arm and width by held-out bits per byte.

    A grid is extended until the best rate is not at its end. `path` is rewritten after each run; runs that it already
    holds are not repeated.
    """
    for dim, num_layers in SWEEP_WIDTHS:
        preset = Preset(num_layers=num_layers, dim=dim)
        about = {"steps": SWEEP_STEPS, "preset": vars(preset) | {"dim": None, "num_layers": None}}
        for arm in SWEPT:
            loss = lambda lr, arm=arm, preset=preset: _held_out_after(arm_config(arm, preset, SWEEP_STEPS, lr=lr))
            centre = optim.default_lr(kind_of_model(MODELS[arm]["model"]["name"]), dim)
            sweeps.bracket(path, f"{arm} {num_layers}x{dim}", centre, loss, **about)


def _held_out_after(config):
    with tempfile.TemporaryDirectory() as workdir:
        model, params, _ = trained([config], Path(workdir))
    return bits_per_byte(model, params, held_out(config, 2**17))["valid_bits_per_byte"]


@reported("stopped; nothing was written")
def main(argv=None) -> None:
    parser = Parser(
        prog="python -m experiments.compare.run", description="RWKV-4 and RWKV-7 against a transformer of equal size."
    )
    parser.add_argument("--duration", type=float, default=6.0, help="approximate total minutes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="stdlib", help="a text file or folder instead of the embedded corpus")
    parser.add_argument("--out", type=user_path, default=HERE, help="folder for results.json and figure.png")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, numbers without meaning")
    parser.add_argument("--sweep", action="store_true", help="sweep learning rates instead")
    args = parser.parse_args(argv)
    if not 0 < args.duration < float("inf"):
        raise ValueError(f"duration is {args.duration:g}, expected minutes above 0")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"seed is {args.seed}, expected 0 to 2^32 - 1")
    files.check_output_folder(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        sweep(args.out / "sweep.json")
        return
    preset, minutes = (SMOKE, 0.1) if args.smoke else (Preset(), args.duration)
    with tempfile.TemporaryDirectory() as elsewhere:  # models of a smoke run must not replace real ones
        models = Path(elsewhere if args.smoke else "runs/compare")
        results = compare(preset, minutes, args.seed, args.text or "stdlib", models)
    write_json(args.out / "results.json", results)
    plot.draw(results, args.out / "figure.png")
    print(table.render(results))
    print(f"written: {args.out / 'results.json'}, {args.out / 'figure.png'}")


if __name__ == "__main__":
    end(main())
