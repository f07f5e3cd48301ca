"""The figure of `results.json`: held-out loss of the four starts, and what the small one with LN0 gains."""

import numpy as np
from matplotlib.ticker import LogLocator

from experiments.figures import plt, saved

COLOURS = ("#c0392b", "#e59866", "#2c3e50", "#7fb3d5")


def draw(results, path) -> None:
    """Write the figure as PNG."""
    base, stamp = results["study"]["base"], results["stamp"]
    tokens_a_step = base["seq_len"] * base["batch_size"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for arm, colour in zip(results["study"]["arms"], COLOURS, strict=True):
        runs = [run for name, run in results["cells"].items() if name.startswith(f"{arm}, seed ")]
        for i, run in enumerate(runs):
            label = f"{arm} (lr {run['lr']:g})" if i == 0 else None
            tokens = tokens_a_step * np.array(run["curve"]["evaluated_steps"])
            left.plot(tokens, run["curve"]["valid_loss_nats"], color=colour, linewidth=0.9, label=label)
    left.set(xscale="log", xlabel="tokens", ylabel="held-out nats a token")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    names = list(next(iter(results["differences"].values())))
    for i, name in enumerate(names):
        for j, at_share in enumerate(results["differences"].values()):
            mean, low, high = at_share[name]
            x = j + 0.2 * (i - 1)
            right.plot([x, x], [low, high], color=COLOURS[i], linewidth=1.5)
            right.plot(x, mean, "o", color=COLOURS[i], markersize=5, label=name if j == 0 else None)
    right.axhline(0, color="grey", linewidth=0.6)
    right.set_xticks(range(len(results["differences"])), [f"{float(x):.0%}" for x in results["differences"]])
    right.set(xlabel="share of the run", ylabel="nats a token (below 0: better)")
    right.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.suptitle(
        f"{base['model.num_layers']} x {base['model.dim']}, vocabulary {base['model.vocab_size']:,}, "
        f"{tokens_a_step * base['steps']:,} tokens, {len(runs)} paired seeds; "
        f"{', '.join(stamp['devices'])}, {stamp['date']}",
        fontsize=9,
    )
    saved(figure, path)
