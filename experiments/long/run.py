"""Memory of a training step against the length of its sequence, whole and in segments.

Claim: with `segments`, a step on T tokens takes the memory of one segment plus a state of fixed size per border, with
the exact gradient and with truncated back-propagation. A small model trains so at T = 65,536 on one CPU within 8 GiB.
Contradicted if the peak of any row with segments reaches 8 GiB. This limit is weak: the whole sequence took 5.8 GiB.
The figure and the table show how memory grows with T.

    python -m experiments.long.run [--smoke] [--out=DIR]

RWKV-4 of 4 x 128 (that of configs/tiny.py, 256 bytes of vocabulary), one row, float32, Adam. Each row of the table is
a separate process that takes two steps. "resident" is the largest resident set of that process, with Python, JAX and
the compiler, sampled every 5 ms (Linux' own ru_maxrss reported 0.6 GB for a process seen at 6). "temporary" is the
memory that XLA plans beside arguments and results (`memory_analysis`). Segments are of 1,024 tokens.

Cost: some minutes on 2 cores. Writes results.json and figure.png.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from experiments import stamp
from experiments.results import draw, write_json
from rwkv_jax import files, models, train
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import to_json, user_path
from rwkv_jax.train import optim

LENGTHS, SMOKE_LENGTHS = (1024, 4096, 16_384, 65_536), (256, 512)
SEGMENT, SMOKE_SEGMENT = 1024, 128
WAYS = {"whole": (False, False), "segments": (True, False), "segments, stopped": (True, True)}
LIMIT = 8 * 2**30
ROOT = Path(__file__).parents[2]


def measure(seq_len: int, segments: int, stop_gradient: bool) -> dict:
    """Return the memory of two training steps, run in a process of their own."""
    command = [sys.executable, "-m", "experiments.long.run", f"--child={seq_len}:{segments}:{int(stop_gradient)}"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {child.returncode}: {child.stderr[-500:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _watch(largest):
    page, statm = os.sysconf("SC_PAGE_SIZE"), Path("/proc/self/statm")
    while True:
        largest[0] = max(largest[0], page * int(statm.read_text().split()[1]))
        time.sleep(0.005)


def _two_steps(seq_len, segments, stop_gradient):
    largest = [0]
    threading.Thread(target=_watch, args=(largest,), daemon=True).start()
    model = models.build("rwkv4", vocab_size=256, num_layers=4, dim=128)
    tx = optim.optimiser()
    state = jax.jit(train.make_init(model, tx))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 256, (1, seq_len + 1), dtype=np.int32)
    batch = {"tokens": tokens, "mask": np.ones((1, seq_len), bool)}
    step = train.make_step(model, tx, segments=segments, stop_gradient=stop_gradient)
    lr = np.float32(1e-3)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, lr).compile()
    for _ in range(2):
        state, values = jax.block_until_ready(compiled(state, batch, lr))
    return {
        "resident_bytes": largest[0],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "loss_nats": float(values["loss_nats"]),
    }


@reported()
def main(argv=None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=user_path, default=Path(__file__).parent)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        seq_len, segments, stop_gradient = map(int, args.child.split(":"))
        print(to_json(_two_steps(seq_len, segments, bool(stop_gradient))))
        return 0
    files.check_output_folder(args.out)
    lengths, segment = (SMOKE_LENGTHS, SMOKE_SEGMENT) if args.smoke else (LENGTHS, SEGMENT)
    rows = []
    for seq_len in tqdm(lengths, desc="lengths", disable=None):
        for way, (cut, stop_gradient) in WAYS.items():
            segments = seq_len // segment if cut else 1
            row = {"T": seq_len, "way": way, "segments": segments, **measure(seq_len, segments, stop_gradient)}
            rows.append(row)
            resident, temporary = (row[f"{name}_bytes"] / 2**20 for name in ("resident", "temporary"))
            print(f"{seq_len:>7,}  {way:<18}{resident:>9,.0f} MiB resident {temporary:>9,.0f} MiB temporary")
    largest = max(row["resident_bytes"] for row in rows if row["way"] != "whole")
    claims = {"largest_resident_in_segments": largest, "below": LIMIT, "held": largest < LIMIT}
    results = {"stamp": stamp.stamp(), "claims": claims, "rows": rows}
    write_json(args.out / "results.json", results)
    draw("long", args.out / "results.json")
    return 0 if claims["held"] else 1


if __name__ == "__main__":
    end(main())
