"""The figure of `results.json`: loss by tokens and by wall time, cost of decoding against context."""

import numpy as np

from experiments.figures import COLOURS, plt, saved
from experiments.results import redraw


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (tokens, seconds, decode) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for arm, row in results["arms"].items():
        style = {"color": COLOURS[arm], "label": arm}
        curve = np.array(row["curve"])
        bits = _smooth(curve[:, 2])
        tokens.plot(curve[:, 0] / 1e6, bits, **style)
        seconds.plot(curve[:, 1], bits, **style)
        tokens.plot(curve[-1, 0] / 1e6, row["bits_per_byte"], "o", color=COLOURS[arm])
        cost = [(d["context"], 1e3 / d["tokens_per_second"]) for d in row["decode"]]
        decode.plot(*np.array(cost).T, "o-", **style)
    for axis in (tokens, seconds):
        for name, level in results["counted"].items():
            if name != "unigram":
                axis.axhline(level, color="grey", linewidth=0.8, linestyle=":")
                axis.annotate(
                    name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
                )
        axis.set_ylabel("bits per byte (training; dots: held out)")
        low = min(min(a["bits_per_byte"] for a in results["arms"].values()), *results["counted"].values())
        axis.set_ylim(low - 0.2, max(4.5, low + 1))
    tokens.set_xlabel("training tokens, millions")
    seconds.set_xlabel("training time, seconds")
    decode.set(xlabel="context, tokens", ylabel="ms per decoded token", xscale="log", yscale="log")
    decode.legend(frameon=False)
    preset, stamp = results["preset"], results["stamp"]
    figure.suptitle(
        f"{preset['num_layers']} x {preset['dim']}, {preset['tokens'] / 1e6:.2f} M tokens of "
        f"{results['corpus']['name']}, one seed; {stamp['cores']} cores, {stamp['date']}",
        fontsize=10,
    )
    saved(figure, path)


def _smooth(y, window=5):
    """Running mean over what there is of `window` log steps."""
    sums = np.convolve(y, np.ones(window), mode="full")[: len(y)]
    return sums / np.minimum(np.arange(1, len(y) + 1), window)


if __name__ == "__main__":
    redraw("compare")
