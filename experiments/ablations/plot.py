"""The figure of `results.json`: what each change costs, with its interval and the pairs of seeds behind it.

python -m experiments.ablations.plot [results.json [figure.png]]
"""

from experiments.figures import main, plt, saved


def draw(results, path) -> None:
    """Write the figure as PNG. The axis is linear near zero and logarithmic beyond: effects differ a hundredfold."""
    arms = {arm: row for arm, row in results["arms"].items() if "difference" in row}
    arms = dict(sorted(arms.items(), key=lambda item: item[1]["difference"]))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(arms)), layout="constrained")
    for y, row in enumerate(arms.values()):
        colour = "#2c3e50" if row["resolved"] else "#95a5a6"
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.5)
        axes.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", color=colour, markersize=8)
        axes.plot(row["difference"], y, "o", color=colour, markersize=5)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.01)
    ticks = [-0.1, -0.01, 0, 0.01, 0.1, 1]
    low, high = min(0, *(row["low"] for row in arms.values())), max(row["high"] for row in arms.values())
    axes.set_xticks([x for x in ticks if low <= x <= max(high, 0.1)])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlabel("bits per byte beside the released model (right: worse); dark: resolved after Holm's correction")
    fields, stamp = results["fields"], results["stamp"]
    axes.set_title(
        f"{fields['num_layers']} x {fields['dim']}, {results['tokens']:,} tokens, {len(fields['seeds'])} pairs; "
        f"{', '.join(stamp['devices'])}, {stamp['date']}",
        fontsize=9,
    )
    saved(figure, path)


if __name__ == "__main__":
    main(draw, __file__)
