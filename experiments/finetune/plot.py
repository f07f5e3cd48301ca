"""The figure of `results.json`: what each way to fine-tune gains on the new text and loses on the old."""

from experiments.figures import plt, saved

COLOURS = {"new": "#c0392b", "old": "#2c3e50"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    cells = {name.removesuffix(", seed 0"): cell for name, cell in results["cells"].items()}
    for text, rows in (("new", results["table"]), ("old", results["old"])):
        label = f"{text} text: {cells['none']['texts'][text]}"
        for arm, row in rows.items():
            if arm == "none":
                continue
            value, low, high = (row[name] for name in ("difference", "low", "high"))
            spread = None if low is None else [[value - low], [high - value]]
            axis.errorbar(cells[arm]["trained"], value, spread, fmt="o", color=COLOURS[text], capsize=3, label=label)
            label = None
            if text == "new":
                where = {"ha": "left", "xytext": (7, 4)} if arm == "full" else {"ha": "right", "xytext": (-7, 4)}
                axis.annotate(arm, (cells[arm]["trained"], value), textcoords="offset points", fontsize=8, **where)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="trained parameters", ylabel="bits per byte, change by fine-tuning")
    axis.margins(x=0.15, y=0.15)
    axis.legend(frameon=False, fontsize=8)
    base, stamp = results["study"]["base"], results["stamp"]
    size = f"{base['model.num_layers']} x {base['model.dim']}, {base['steps']} steps, one seed"
    axis.set_title(f"{size}; {stamp['cores']} cores, {stamp['date']}", fontsize=10)
    saved(figure, path)
