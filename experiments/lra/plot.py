"""The figure of `results.json`: share right of rules and models, and the loss of the models against tokens."""

from experiments.figures import COLOURS, label_ends, plt, saved, titled
from experiments.results import redraw

TABLE_4 = {"attention": (0.3533, 0.3998), "RWKV": 0.5588}  # of the paper, lengths 500 to 2,000


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained", width_ratios=(1.5, 1))
    base, rules, arms = results["study"]["base"], results["rules"], results["right"]
    lengths = f"lengths {base['above']} to {base['below']}"
    left.plot(rules.values(), list(rules), "o", color="#666666", label=f"rules, {lengths}")
    public = results["public_rules"]
    left.plot(public.values(), list(public), "s", color="black", fillstyle="none", label="rules, lengths 500 to 2,000")
    for arm, share in arms.items():
        left.axvline(share, color=COLOURS[arm], label=f"{arm}, {lengths}")
    left.axvspan(*TABLE_4["attention"], color="#bbbbbb", alpha=0.4, linewidth=0, label="Table 4, attention")
    left.axvline(TABLE_4["RWKV"], color="#888888", linestyle=":", label="Table 4, RWKV")
    left.invert_yaxis()
    left.set(
        xlabel="share of the expressions right", xlim=(0, 1.02), title="models beside rules that evaluate only a part"
    )
    left.legend(loc="lower left", frameon=True, edgecolor="none", framealpha=0.9)
    for arm in arms:
        curve = results["cells"][f"{arm}, seed 0"]["curve"]
        right.plot([tokens / 1e6 for tokens in curve["tokens"]], curve["loss_nats"], color=COLOURS[arm], label=arm)
    right.set(xlabel="training tokens, millions", ylabel="training loss, nats an expression", title="training")
    label_ends(right)
    arm, share = max(arms.items(), key=lambda item: item[1])
    passed = [rule for rule, its in rules.items() if its < share]
    than = f"; the rule '{passed[-1]}' {rules[passed[-1]]:.0%}" if passed else ""
    size = f"{base['model.num_layers']} x {base['model.dim']}"
    titled(figure, results, f"ListOps, {lengths}: {arm} has {share:.0%} right{than}", size)
    saved(figure, path)


if __name__ == "__main__":
    redraw("lra")
