"""The figure of `results.json`: the paper's numbers against model size, of all tasks and of LAMBADA."""

from experiments.figures import label_ends, panels, saved, titled, within_decades
from experiments.results import redraw

STYLES = {
    "RWKV-4": {"color": "#d55e00", "marker": "o"},
    "Pythia": {"color": "#000000", "marker": "s"},
    "GPT-Neo": {"color": "#0072b2", "marker": "^"},
    "GPT-J": {"color": "#009e73", "marker": "D"},
    "GPT-NeoX": {"color": "#cc79a7", "marker": "v"},
}
PANELS = {"mean": "mean accuracy of 13 tasks, %", "lambada_openai": "LAMBADA, accuracy, %"}


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, [axes] = panels(len(PANELS), width=5.4, height=3.9)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for family, style in STYLES.items():
            rows = [row for row in results["expected"] if row["family"] == family]
            values = [row["values"].get(name, row.get(name)) for row in rows]
            axis.plot([row["billions"] for row in rows], values, label=family, **style)
        axis.set(xlabel="parameters, billions", ylabel=label)
        within_decades(axis.xaxis)
        label_ends(axis)
    titled(
        figure, results, "Zero-shot accuracy by size, as published; not run here", "arXiv:2305.13048v1, Tables 3 and 4"
    )
    saved(figure, path)


if __name__ == "__main__":
    redraw("zero_shot")
