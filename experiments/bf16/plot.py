"""The figure of `results.json`: loss against steps, and the difference that bfloat16 parameters make.

python -m experiments.bf16.plot [results.json [figure.png]]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    by_dtype = lambda dtype: [row for row in results["rows"] if row["param_dtype"] == dtype]
    for row_32, row_16 in zip(by_dtype("float32"), by_dtype("bfloat16"), strict=True):
        left.plot(row_32["steps"], row_32["loss_nats"], color="#2c3e50", linewidth=0.8)
        left.plot(row_16["steps"], row_16["loss_nats"], color="#c0392b", linewidth=0.8, linestyle="--")
        difference = np.subtract(row_16["loss_nats"], row_32["loss_nats"])
        right.plot(row_32["steps"], difference, linewidth=0.8, label=f"seed {row_32['seed']}")
    left.set(xlabel="steps", ylabel="nats a byte", title="parameters float32 (line), bfloat16 (dashed)")
    right.axhline(0, color="grey", linewidth=0.6)
    right.set(xlabel="steps", ylabel="nats a byte", title="bfloat16 - float32, same batches")
    right.legend(frameon=False, fontsize=8)
    stamp = results["stamp"]
    figure.suptitle(f"{', '.join(stamp['devices'])}, {stamp['date']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_name("figure.png")
    draw(json.loads(source.read_text()), target)
