"""The figure of `results.json`: what each way to fine-tune gains on the new text and loses on the old.

python -m experiments.finetune.plot [results.json [figure.png]]
"""

from experiments.figures import main, plt, saved

COLOURS = {"new": "#c0392b", "old": "#2c3e50"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    arms = {arm: row for arm, row in results["arms"].items() if arm != "none"}
    for name, colour in COLOURS.items():
        label = f"{name} text: {results['texts'][name]['name']}"
        for arm, row in arms.items():
            value, low, high = row[name]["minus_none"]
            spread = None if low is None else [[value - low], [high - value]]
            axis.errorbar(row["trained"], value, spread, fmt="o", color=colour, capsize=3, label=label)
            label = None
            if name == "new":
                where = {"ha": "left", "xytext": (7, 4)} if arm == "full" else {"ha": "right", "xytext": (-7, 4)}
                axis.annotate(arm, (row["trained"], value), textcoords="offset points", fontsize=8, **where)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="trained parameters", ylabel="bits per byte, change by fine-tuning")
    axis.margins(x=0.15, y=0.15)
    axis.legend(frameon=False, fontsize=8)
    preset, stamp = results["preset"], results["stamp"]
    axis.set_title(
        f"{results['parameters'] / 1e6:.2f} M parameters, {preset['steps']} steps, one seed; "
        f"{stamp['cores']} cores, {stamp['date']}",
        fontsize=10,
    )
    saved(figure, path)


if __name__ == "__main__":
    main(draw, __file__)
