"""The figure of results.json: every run, the frontier and both laws."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import NullFormatter

from experiments import figures
from experiments.results import redraw
from experiments.scaling import fit


def draw(results: dict, path: Path) -> None:
    """Draw every run in Fig. 4's colours: red the frontier, blue what is beyond the fit, black the rest; both laws."""
    arms = results["arms"]
    figure, [axes] = figures.panels(len(arms), width=4.6, height=3.9, sharey=True)
    for axis, (arm, its) in zip(axes, arms.items(), strict=True):
        compute, loss = np.array(its["flops"]), np.array(its["loss_nats"])
        frontier, beyond = np.isin(np.arange(len(compute)), its["frontier"]), compute > its["fitted_until"]
        for runs, style, color, label in (
            (~frontier, ".", "#2c3e50", "other runs"),
            (frontier & ~beyond, "o", "#c0392b", "frontier"),
            (frontier & beyond, "o", "#2980b9", "frontier, not fitted"),
        ):
            axis.plot(compute[runs], loss[runs], style, color=color, label=label)
        x = np.geomspace(compute.min(), compute.max())
        for name, style in zip(fit.LAWS, ("-", "--"), strict=True) if its["laws"] else ():
            law = fit.Law(*(its["laws"][name][field] for field in fit.Law._fields))
            axis.plot(x, law(x), style, color="grey", label=name, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="training FLOP", title=arm)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("held-out loss, nats")
    axes[0].legend(frameon=False, fontsize=8)
    base = results["study"]["base"]
    figures.titled(figure, results, f"tokens: {base.get('tokenizer', 'bytes')} of {base.get('corpus', 'stdlib')}")
    figures.saved(figure, path)


if __name__ == "__main__":
    redraw("scaling")
