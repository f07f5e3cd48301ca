"""The figure of results.json: every run, the frontier and both laws."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments import figures
from experiments.results import redraw
from experiments.scaling import fit


def draw(results: dict, path: Path) -> None:
    """Draw every run of an arm: filled the frontier, hollow what is beyond the fit, grey the rest; both laws."""
    arms = results["arms"]
    columns = 2 if len(arms) in (2, 4) else min(3, len(arms))
    rows = -(-len(arms) // columns)
    width = 5.4 if columns == 2 else 4.2
    figure, axes = figures.panels(columns, rows, width=width, height=3.7, sharex=True, sharey=True)
    for axis in axes.flat[len(arms) :]:
        axis.remove()
    for axis, (arm, its) in zip(axes.flat, arms.items(), strict=False):
        compute, loss = np.array(its["flops"]), np.array(its["loss_nats"])
        frontier, beyond = np.isin(np.arange(len(compute)), its["frontier"]), compute > its["fitted_until"]
        x = np.geomspace(compute.min(), compute.max())
        for name, line in zip(fit.LAWS, ("-", "--"), strict=True) if its["laws"] else ():
            law = fit.Law(*(its["laws"][name][field] for field in fit.Law._fields))
            axis.plot(x, law(x), line, color="#666666", label=name, linewidth=1)
        figures.label_ends(axis)
        look = {"color": figures.COLOURS[arm], "linestyle": "", "markersize": 6}
        axis.plot(compute[~frontier], loss[~frontier], ".", color="#aaaaaa", label="other runs")
        axis.plot(compute[frontier & ~beyond], loss[frontier & ~beyond], marker="o", label="frontier", **look)
        hollow = {"marker": "o", "fillstyle": "none", "label": "frontier, not fitted"}
        axis.plot(compute[frontier & beyond], loss[frontier & beyond], **look | hollow)
        handles = [line for line in axis.get_lines() if line.get_linestyle() == "None"]
        axis.legend(handles=handles, loc="lower left")
        axis.set_title(arm)
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("training FLOP")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("held-out loss, nats a token")
    axes[0, 0].set(xscale="log")  # which all share
    figures.within_decades(axes[0, 0].yaxis)
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    base = results["study"]["base"]
    condition = f"tokens: {base.get('tokenizer', 'bytes')} of {base.get('corpus', 'stdlib')}"
    figures.titled(figure, results, _finding(results.get("compute_at_equal_loss", {})), condition)
    figures.saved(figure, path)


def _finding(ratios: dict) -> str:
    told = [f"{pair.replace(' over ', ' / ')} {fit.told(its)}" for pair, its in ratios.items()]
    return f"Compute at equal loss: {', '.join(told)}" if told else "Held-out loss against training compute"


if __name__ == "__main__":
    redraw("scaling")
