"""Speed against the implementations that people use, side by side in one run, as ratios.

Claims, on 2 CPU cores in float32:
  train        A 6 x 512 byte-level RWKV-4 (batch 4, T 512) is at least 2 times as fast as transformers'
               RwkvForCausalLM. Our transformer is at least 0.9 times as fast as its GPT-2 with fused attention at the
               same shape, so that comparing RWKV-4 with ours is fair. RWKV-4 against the transformer is reported with
               both FLOP counts and a breakdown of each step.
  decode       Over contexts of 0 to 131,072 tokens (6 x 768) a token of RWKV-4 takes constant time, and the
               transformer with its cache reads at 0.6 of the measured bandwidth or more at 8,192.
  generation   A 12 x 768 RWKV-4 with V 50,277 decodes at least 2 times as fast, and reads 1,024 tokens 1.6 times as
               fast, as the `rwkv` package's "cpu fp32". A token in at most 1 / 0.75 of the time of reading its
               parameters alone is an aim: 1 / 0.66 on 2026-11-24.
  ops          WKV forward and backward at B 4, T 1,024, D 512 takes at most 0.35 of the time of autodiff through a
               plain scan, 3 times its own forward pass, and a quarter of the temporary memory; time a token from 32k
               to 128k within 25 %. Three times its own forward pass is an aim: 3.3 on 2026-11-24.
  rwkv7        wkv6 and wkv7 against autodiff of a plain scan (5 times as fast wanted: 8.5 and 3.5 on 2026-11-29); a
               step of RWKV-7, 6 x 512, against RWKV-4, the transformer and, where it is installed (Python 3.12),
               jax-linear-attention (1.8 wanted); 12 x 768 with V 65,536 against the `rwkv` package (1.5 wanted); time
               a token after 131,072 tokens. Runs only when named: the package has one interface for RWKV-7 and another
               for the rest, and a process can load only one of them.
  startup      Seconds of tracing, lowering and compiling a training step, a prompt and a decode step, and of the
               commands up to their first step or token, the token against that of the `rwkv` package.
               `--against=PATH`, a checkout of an earlier commit, measures that too. Runs only when named.

On a GPU, with flash-linear-attention and torch for CUDA installed and RWKV-LM cloned to PATH, `--suite=ops` measures
WKV against the released CUDA kernel, that package's Triton kernel and fused attention, in at most 8 minutes; `pile`
measures training. Both ran once on an H100, see docs/results.md. No TPU has run this yet.

    python -m experiments.speed.run --suite=ops --rwkv-lm=PATH
    python -m experiments.speed.pile

    make speed
    python -m experiments.speed.run [--suite=train|decode|ops|generation|rwkv7|startup] [--smoke] [--out=DIR]
    python -m experiments.speed.plot

Needs requirements-live.txt. Cost: about 30 minutes on 2 cores, startup 10. The machine must be idle meanwhile.
"""

import os
from pathlib import Path

from experiments import stamp
from experiments.results import write_json
from experiments.speed import decode, generation, ops, rwkv7, startup, train
from rwkv_jax import files
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import read_json, user_path

SUITES = {
    "train": train,
    "decode": decode,
    "ops": ops,
    "generation": generation,
    "rwkv7": rwkv7,
    "startup": startup,
}
BY_NAME_ONLY = ("rwkv7", "startup")


def line(row: dict) -> str:
    """Format two speeds side by side."""
    sides = [f"{row[side]} {row[f'{side}_per_second']:,.1f}" for side in ("ours", "theirs")]
    wanted = f" (at least {row['wanted']} wanted)" if row["wanted"] else ""
    return f"{row['what']}: {', '.join(sides)}, ratio {row['ratio']:.2f}{wanted}"


@reported()
def main(argv=None) -> int:
    parser = Parser(prog="python -m experiments.speed.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, help="one suite; default: all except rwkv7 and startup")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, numbers without meaning")
    parser.add_argument("--out", type=user_path, default=Path(__file__).parent, help="folder for results.json")
    parser.add_argument(
        "--rwkv-lm", type=user_path, help="clone of BlinkDL/RWKV-LM, to compile and time its CUDA kernel"
    )
    parser.add_argument("--against", type=user_path, help="checkout of an earlier commit, to time its startup too")
    args = parser.parse_args(argv)
    if args.against and not (args.suite == "startup" and (args.against / "rwkv_jax").is_dir()):
        raise ValueError(f"--against={args.against}: expected --suite=startup and a folder with rwkv_jax/")
    # By default JAX preallocates three quarters of a GPU's memory, and the peers in torch need some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = {
        "ops": {"rwkv_lm": args.rwkv_lm},
        "startup": {"against": args.against},
    }
    files.check_output_folder(args.out)
    path = args.out / "results.json"
    for suite in [args.suite] if args.suite else [name for name in SUITES if name not in BY_NAME_ONLY]:
        results = SUITES[suite].run(args.smoke, **options.get(suite, {}))
        beside = [line(row) for row in results["rows"]] if suite in ("train", "generation", "rwkv7") else []
        print("\n".join(beside + SUITES[suite].report(results)), flush=True)
        whole = read_json(path) if path.exists() else {}
        write_json(path, whole | {suite: results | {"stamp": stamp.stamp()}})
    return 0


if __name__ == "__main__":
    end(main())
