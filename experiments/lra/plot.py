"""The figure of `results.json`: share right of rules and models, and the loss of the models against tokens."""

from experiments.figures import COLOURS, plt, saved
from experiments.results import redraw


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(1.5, 1))
    base, rules = results["study"]["base"], results["rules"]
    lengths = f"lengths {base['above']} to {base['below']}"
    left.plot(rules.values(), list(rules), "o", color="grey", label=f"rules, {lengths}")
    public = results["public_rules"]
    left.plot(public.values(), list(public), "s", color="black", fillstyle="none", label="rules, lengths 500 to 2,000")
    for arm, share in results["right"].items():
        left.axvline(share, color=COLOURS[arm], label=f"{arm}, {lengths}")
    left.axvspan(0.3533, 0.3998, color="grey", alpha=0.2, label="attention in Table 4")
    left.axvline(0.5588, color="grey", linestyle=":", label="RWKV in Table 4")
    left.invert_yaxis()
    left.set(xlabel="expressions right", xlim=(0, 1), title="ListOps: what a share of right answers is worth")
    left.legend(frameon=False, fontsize=7, loc="lower left")
    for arm in results["right"]:
        curve = results["cells"][f"{arm}, seed 0"]["curve"]
        right.plot([tokens / 1e6 for tokens in curve["tokens"]], curve["loss_nats"], color=COLOURS[arm], label=arm)
    right.set(
        xlabel="tokens read, millions",
        ylabel="training loss, nats",
        title=f"{base['model.num_layers']} x {base['model.dim']}",
    )
    right.legend(frameon=False, fontsize=8)
    saved(figure, path)


if __name__ == "__main__":
    redraw("lra")
