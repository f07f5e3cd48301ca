"""The figure of `results.json`: the norm of the gradient by the embedding n tokens back, against n."""

import numpy as np

from experiments.figures import COLOURS, mark, panels, saved, titled
from experiments.results import redraw


def draw(results, path) -> None:
    """Write the figure as PNG."""
    its, fields = results["cells"]["reach"], results["fields"]
    lag = np.array(its["lag"]) + 1
    figure, [[axis]] = panels(1, width=7, height=4)
    axis.fill_between(lag, its["low"], its["high"], color=COLOURS["rwkv4"], alpha=0.2, linewidth=0)
    axis.plot(lag, its["mean"], color=COLOURS["rwkv4"])
    nearest = its["reach"] + 1
    mark(axis, nearest, "95 % of the sum", ha="right")
    mark(axis, fields["seq_len"], "window of the training")
    axis.set(xscale="log", yscale="log", xlabel="n + 1: bytes before the prediction", ylabel="norm, of the nearest 8")
    axis.set_title(f"norm of dL/d emb: mean of {its['files']} files; band: 10 to 90 %")
    shape = f"RWKV-4, {fields['num_layers']} x {fields['dim']}, {fields['steps']} steps"
    titled(figure, results, f"The nearest {nearest} bytes have 95 % of the gradient's norm", shape)
    saved(figure, path)


if __name__ == "__main__":
    redraw("reach")
