"""The figure of `results.json`: loss by tokens and by wall time, cost of decoding against context."""

import numpy as np

from experiments.figures import COLOURS, label_ends, panels, saved, style, titled
from experiments.results import redraw


def draw(results, path) -> None:
    """Write the figure as PNG."""
    arms = results["arms"]
    figure, [(tokens, seconds, decode)] = panels(3, width=4.1, height=3.9)
    for arm, row in arms.items():
        curve, its = np.array(row["curve"]), style(arm)
        bits = _smooth(curve[:, 2])
        tokens.plot(curve[:, 0] / 1e6, bits, **its | {"marker": ""})
        seconds.plot(curve[:, 1], bits, **its | {"marker": ""})
        for axis, x in ((tokens, curve[-1, 0] / 1e6), (seconds, curve[-1, 1])):
            axis.plot(x, row["bits_per_byte"], its["marker"], color=COLOURS[arm])
        cost = [(d["context"], 1e3 / d["tokens_per_second"]) for d in row["decode"]]
        decode.plot(*np.array(cost).T, **its)
    low = min(min(row["bits_per_byte"] for row in arms.values()), *results["counted"].values())
    for axis in (tokens, seconds):
        for name, level in results["counted"].items():
            if name != "unigram":
                axis.axhline(level, color="#888888", linewidth=0.8, linestyle=":", label=name)
        axis.set_ylim(low - 0.2, max(4.5, low + 1))
    tokens.set(xlabel="training tokens, millions", ylabel="bits per byte")
    tokens.set_title("training, smoothed; markers: held out")
    seconds.set(xlabel="training time, seconds", title="the same, by time")
    decode.set(
        xlabel="context, tokens", ylabel="ms a token", title="time to decode a token", xscale="log", yscale="log"
    )
    for axis in (tokens, decode):
        label_ends(axis)
    seconds.tick_params(labelleft=False)
    preset, stamp = results["preset"], results["stamp"]
    longest = max(row["decode"][-1]["context"] for row in arms.values())
    last = {arm: 1e3 / row["decode"][-1]["tokens_per_second"] for arm, row in arms.items()}
    decoding = ", ".join(f"{arm} {ms:.2g} ms" for arm, ms in sorted(last.items(), key=lambda item: item[1]))
    size = f"{preset['num_layers']} x {preset['dim']}, {preset['tokens'] / 1e6:.2f} M tokens"
    condition = f"{size} of {results['corpus']['name']}, one seed; {stamp['cores']} cores"
    titled(figure, results, f"A token decoded after {longest:,}: {decoding}", condition)
    saved(figure, path)


def _smooth(y, window=5):
    """Running mean over what there is of `window` log steps."""
    sums = np.convolve(y, np.ones(window), mode="full")[: len(y)]
    return sums / np.minimum(np.arange(1, len(y) + 1), window)


if __name__ == "__main__":
    redraw("compare")
