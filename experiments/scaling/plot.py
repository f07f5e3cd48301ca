"""The figure of results.json: every run, the frontier, and both laws as far as the compute that they have not seen."""

import numpy as np
from matplotlib.ticker import NullFormatter

from experiments.figures import plt, saved
from experiments.scaling.fit import LAWS, Law


def draw(results, path) -> None:
    """Write the figure as PNG: Fig. 4's colours, red the frontier, blue what is beyond the fit, black the rest."""
    arms = results["arms"]
    figure, axes = plt.subplots(
        1, len(arms), figsize=(4.6 * len(arms), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (arm, its) in zip(axes[0], arms.items(), strict=True):
        compute, loss = np.array(its["flops"]), np.array(its["loss_nats"])
        frontier = np.zeros(len(compute), bool)
        frontier[its["frontier"]] = True
        beyond = compute > its["fitted_until"]
        axis.plot(compute[~frontier], loss[~frontier], ".", color="#2c3e50", label="other runs")
        axis.plot(compute[frontier & ~beyond], loss[frontier & ~beyond], "o", color="#c0392b", label="frontier")
        axis.plot(
            compute[frontier & beyond], loss[frontier & beyond], "o", color="#2980b9", label="frontier, not fitted"
        )
        if its["laws"]:
            x = np.geomspace(compute.min(), compute.max())
            for name, style in zip(LAWS, ("-", "--"), strict=True):
                law = Law(*(its["laws"][name][field] for field in Law._fields))
                axis.plot(x, law(x), style, color="grey", label=name, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="training FLOP", title=arm)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("held-out loss, nats a token")
    axes[0, 0].legend(frameon=False, fontsize=8)
    base, stamp = results["study"]["base"], results["stamp"]
    tokens = f"{base.get('tokenizer', 'bytes')} of {base.get('corpus', 'stdlib')}"
    figure.suptitle(f"tokens: {tokens}; {stamp['devices'][0]}, {stamp['date']}", fontsize=10)
    saved(figure, path)
