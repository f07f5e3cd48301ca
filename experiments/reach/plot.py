"""The figure of `results.json`: the norm of the gradient by the embedding n tokens back, against n."""

import numpy as np

from experiments.figures import plt, saved
from experiments.results import redraw


def draw(results, path) -> None:
    """Write the figure as PNG."""
    its, fields = results["cells"]["reach"], results["fields"]
    lag = np.array(its["lag"]) + 1
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    axis.fill_between(lag, its["low"], its["high"], color="#c0392b", alpha=0.2, linewidth=0)
    axis.plot(lag, its["mean"], color="#c0392b", label=f"mean of {its['files']} files; 10 to 90 %")
    axis.axvline(its["reach"] + 1, color="#2c3e50", linewidth=0.8, linestyle="--", label="95 % of the sum")
    axis.axvline(fields["seq_len"], color="grey", linewidth=0.8, linestyle=":", label="window of the training")
    axis.set(xscale="log", yscale="log", xlabel="n + 1: bytes before the prediction", ylabel="norm, of the nearest 8")
    axis.set_title(f"dL/d emb, RWKV-4 {fields['num_layers']} x {fields['dim']}, {fields['steps']} steps", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    saved(figure, path)


if __name__ == "__main__":
    redraw("reach")
