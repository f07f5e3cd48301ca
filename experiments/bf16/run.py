"""Parameters in bfloat16 beside float32, everything else the same: what halving them costs in loss.

Claim: with moments and the update in float32, bfloat16 parameters lose what rounding them after every step takes: a
change below 1/512 of a parameter is gone. On the same batches from the same start, the final loss on held-out text is
no lower than that of float32; the difference is what a run would pay for 2 bytes a parameter less memory.

    python -m experiments.bf16.run            300 steps of 2 x 64 on the embedded corpus, 3 seeds of each
    python -m experiments.bf16.run --smoke --out=DIR

Cost: 3 minutes on 2 cores. Reproduced: the mean difference of the seeds is above zero and above its standard error;
contradicted: it is below minus that. A demonstration of one small model, one rate and few steps.
Writes results.json beside this file; `python -m experiments.bf16.plot` draws it.
"""

import argparse
import json
import tempfile
from pathlib import Path

from experiments import stamp
from rwkv_jax import metrics, run_config, train

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
PARAM_DTYPES = ("float32", "bfloat16")


def config_of(param_dtype, seed, smoke=False):
    """One run: activations and products are float32 in both."""
    config = run_config.default()
    config.model.update(num_layers=2, dim=64, param_dtype=param_dtype)
    config.update(seq_len=128, batch_size=16, steps=300, seed=seed)
    if smoke:
        config.model.update(num_layers=1, dim=16)
        config.update(seq_len=16, batch_size=2, steps=6)
    config.update(log_every=max(1, config.steps // 30), eval_every=0, eval_tokens=2**15 if not smoke else 2**8)
    config.update(save_every=0)
    return config


def curve(param_dtype, seed, smoke=False) -> dict:
    """Loss in nats of logged steps, each the mean over a batch, and on held-out text after the last."""
    with tempfile.TemporaryDirectory() as workdir:
        train.run(config_of(param_dtype, seed, smoke), workdir)
        rows = metrics.read(Path(workdir) / "metrics.jsonl")
    logged = [row for row in rows if "loss_nats" in row]
    return {
        "param_dtype": param_dtype,
        "seed": seed,
        "steps": [row["step"] for row in logged],
        "loss_nats": [row["loss_nats"] for row in logged],
        "skipped": logged[-1]["skipped"],
        "valid_loss_nats": next(row["valid_loss_nats"] for row in rows if "valid_loss_nats" in row),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json")
    args = parser.parse_args()
    rows = [curve(dtype, seed, args.smoke) for seed in SEEDS[: 1 if args.smoke else None] for dtype in PARAM_DTYPES]
    losses = {dtype: [r["valid_loss_nats"] for r in rows if r["param_dtype"] == dtype] for dtype in PARAM_DTYPES}
    differences = [b - a for a, b in zip(*losses.values(), strict=True)]
    print("held-out nats a byte, bfloat16 - float32, by seed:", *(f"{d:+.4f}" for d in differences))
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"stamp": stamp.stamp(), "rows": rows, "bfloat16_minus_float32_nats": differences}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
