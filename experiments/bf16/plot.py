"""The figure of `results.json`: loss against tokens, and the difference that bfloat16 makes, by seed.

python -m experiments.bf16.plot [results.json [figure.png]]
"""

import numpy as np

from experiments.figures import main, plt, saved

BASE = "float32"
COLOURS = {BASE: "#2c3e50", "bfloat16 activations": "#c0392b", "bfloat16 parameters": "#e67e22"}
LINES = ("-", "--", ":")


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, seed in enumerate(results["fields"]["seeds"]):
        of = lambda arm, seed=seed: results["cells"][f"{arm}, seed {seed}"]["curve"]
        for arm, colour in COLOURS.items():
            curve, style = of(arm), {"color": colour, "linestyle": LINES[i % 3], "linewidth": 0.9}
            label = arm if i == 0 else None
            thousands = np.array(curve["tokens"]) / 1000
            left.plot(thousands, curve["loss_nats"], label=label, **style)
            if arm != BASE:
                difference = np.subtract(curve["loss_nats"], of(BASE)["loss_nats"])
                right.plot(thousands, difference, label=label, **style)
    right.axhline(0, color="grey", linewidth=0.6)
    left.set(xlabel="thousand tokens", ylabel="nats a byte", title="training loss, a line style a seed")
    right.set(xlabel="thousand tokens", ylabel="nats a byte", title="minus float32, same start and batches")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    saved(figure, path)


if __name__ == "__main__":
    main(draw, __file__)
