"""The figure of `results.json`: the paper's numbers against model size, and LAMBADA where it was measured."""

from experiments.figures import plt, saved

PANELS = {"mean": "mean accuracy of 13 tasks, %", "lambada_openai": "LAMBADA, accuracy, %"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for family, color in (
            ("RWKV-4", "C3"),
            ("Pythia", "C0"),
            ("GPT-Neo", "C2"),
            ("GPT-J", "C4"),
            ("GPT-NeoX", "C5"),
        ):
            rows = [row for row in results["expected"] if row["family"] == family]
            values = [row["values"].get(name, row.get(name)) for row in rows]
            axis.plot([row["billions"] for row in rows], values, "o-", color=color, label=family)
        axis.set(xscale="log", xlabel="parameters, billions", ylabel=label)
    measured = [cell for name, cell in results["cells"].items() if name.startswith("lambada ")]
    for cell in measured:
        sizes = [row["billions"] for row in results["expected"] if row.get("checkpoint") == cell["checkpoint"]]
        axes[-1].plot(sizes, [cell["lambada_openai"]] * len(sizes), "k*", markersize=11)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "arXiv:2305.13048v1, Tables 3 and 4, as published"
        + ("; stars: measured here" if measured else "; not run here"),
        fontsize=10,
    )
    saved(figure, path)
