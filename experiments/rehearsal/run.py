"""Memory and roofline of the released sizes on TPU slices, each step compiled for a slice that is not present.

Claim: with parameters split over the chips (FSDP), every size to 14B fits a slice that shares a batch of the paper's,
128 or 256 windows of 1,024 tokens, with most of the memory free. At its roofline the step is bound by arithmetic, not
by the links: nothing up to 14B needs tensor parallelism. Contradicted if a row does not fit, or is bound by anything
other than "compute".

    python -m experiments.rehearsal.run            rows that results.json lacks; without the file, all
    python -m experiments.rehearsal.run --smoke --out=DIR
    python -m experiments.rehearsal.table          as in docs/scale.md

Cost: 1 to 13 minutes a row on 2 cores, 4 GB of memory; no TPU, but its compiler (pip install libtpu; Linux, x86-64).
"""

from pathlib import Path

import jax

from experiments import stamp
from experiments.results import write_json
from rwkv_jax import files
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import read_json, user_path
from rwkv_jax.train import run_config
from rwkv_jax.train.rehearse import rehearse, table

HERE = Path(__file__).parent
ROWS = [
    ("v5e:4x4", ["configs/pile.py:169m"]),
    ("v5p:4x4x8", ["configs/pile.py:7b"]),
    ("v5p:4x4x8", ["configs/pile.py:14b"]),
    ("v5p:4x4x8", ["configs/pile.py:14b", "--config.model.remat=matmuls"]),
    ("v5e:16x16", ["configs/pile.py:14b", "--config.batch_size=256"]),
]
SMOKE = [("v5e:2x2", ["configs/tiny.py", "--config.strategy=fsdp"])]


@reported()
def main(argv=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small model, to check that it runs")
    parser.add_argument("--out", type=user_path, default=HERE, help="folder for results.json")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the TPU compiler is not a device
    files.check_output_folder(args.out)
    path = args.out / "results.json"
    rows = read_json(path)["rows"] if path.exists() else []
    wanted = SMOKE if args.smoke else ROWS
    for target, (config, *flags) in wanted:
        command = " ".join(["python -m rwkv_jax.train", f"--config={config}", *flags, f"--rehearse={target}"])
        if any(row["stamp"]["command"] == command for row in rows):
            continue
        row = rehearse(run_config.read(config, flags), target)
        print(table(row), end="\n\n", flush=True)
        rows.append(row | {"stamp": stamp.stamp() | {"command": command}})
        write_json(path, {"rows": rows})


if __name__ == "__main__":
    end(main())
