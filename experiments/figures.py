"""The style of all figures, labels at the ends of lines, and the default figure of a study."""

import io
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from PIL import Image

__all__ = [
    "COLOURS",
    "draw",
    "label_ends",
    "mark",
    "panels",
    "plt",
    "saved",
    "spread",
    "style",
    "titled",
    "within_decades",
]

DPI, SMALLEST = 110, 9  # dots per inch; points, the smallest font: figures are read at half their size
STYLE = {
    "savefig.dpi": DPI,
    "font.size": 10,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    **{f"{axis}tick.{field}": value for axis in "xy" for field, value in (("major.width", 0.6), ("minor.width", 0.4))},
    **{name: SMALLEST for name in ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")},
}
plt.rcParams.update(STYLE)

# One colour and marker per arm, the same in every figure: Okabe and Ito's palette, and #882255 of Tol's.
COLOURS = {
    "rwkv4": "#d55e00",
    "rwkv5": "#882255",
    "rwkv6": "#cc79a7",
    "rwkv7": "#e69f00",
    "transformer": "#000000",
    "transformer+shift": "#0072b2",
    "transformer, no cache": "#999999",
    "lstm": "#009e73",
    "hybrid": "#56b4e9",
}
MARKERS = dict(zip(COLOURS, "ov^DsPxXh", strict=True))
ENDS = "label at a line's end"


def style(arm: str) -> dict:
    """Return the colour, the marker and the label of an arm, as `plot` takes them."""
    return {"color": COLOURS[arm], "marker": MARKERS[arm], "label": arm}


def panels(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.8, **shared):
    """Return a figure and its axes [rows, columns]; `width` and `height` are inches per panel."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)


def titled(figure, results: dict, finding: str, condition: str = "") -> None:
    """Write the finding above a figure; below it the condition, and the hardware and date of the results' stamp.

    The condition is by default the size and steps of the study's base, as far as it names them.
    """
    base, stamp = results.get("study", {}).get("base", {}), results.get("stamp")
    size = (
        [f"{base['model.num_layers']} x {base['model.dim']}"]
        if {"model.num_layers", "model.dim"} <= base.keys()
        else []
    )
    steps = [f"{base['steps']:,} steps"] if "steps" in base else []
    condition = condition or ", ".join(size + steps)
    stamped = f"{', '.join(stamp['devices'])}, {stamp['date']}" if stamp else ""
    text = "; ".join(filter(None, [condition, stamped]))
    characters = int(9.8 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(finding, characters), x=0.01, ha="left")
    figure.supxlabel(textwrap.fill(text, 130), x=0.99, ha="right", fontsize=SMALLEST, color="#666666")


def mark(axis, x: float, text: str, ha: str = "left") -> None:
    """Draw a vertical line with a text at its foot, to the right of the line unless `ha` is "right"."""
    axis.axvline(x, color="#888888", linewidth=0.8)
    where = {"xycoords": axis.get_xaxis_transform(), "xytext": (3 if ha == "left" else -3, 2)}
    axis.annotate(text, (x, 0), textcoords="offset points", ha=ha, color="#666666", fontsize=SMALLEST, **where)


def within_decades(of_axis, text="{x:g}") -> None:
    """Give the x or y axis of a panel a logarithmic scale with ticks at 1, 2 and 5, for ranges of few decades."""
    of_axis.axes.set(**{f"{of_axis.axis_name}scale": "log"})
    of_axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    of_axis.set_major_formatter(text)
    of_axis.set_minor_locator(NullLocator())


def label_ends(axis) -> None:
    """Write the label of every line to the right of its last point; `saved` keeps the labels apart."""
    for line in axis.get_lines():
        x_N, y_N = np.array(line.get_xdata(), float), np.array(line.get_ydata(), float)
        known = np.flatnonzero(np.isfinite(x_N) & np.isfinite(y_N))
        if line.get_label().startswith("_") or not len(known):
            continue
        last = known[-1]
        leader = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.7, "relpos": (0, 0.5)}
        axis.annotate(
            line.get_label(),
            (x_N[last], y_N[last]),
            (1.03, 0.5),
            xycoords=line.get_transform(),
            textcoords="axes fraction",
            arrowprops=leader | {"shrinkA": 1, "shrinkB": 2, "linestyle": (0, (1, 2))},
            color=0.8 * np.array(to_rgb(line.get_color())),
            fontsize=SMALLEST,
            va="center",
            annotation_clip=False,
            gid=ENDS,
        )


def spread(y_N, gap: float, low: float, high: float) -> np.ndarray:
    """Return the positions nearest to `y_N` in its order, at least `gap` apart, and within [low, high] if they fit."""
    order = np.argsort(y_N, kind="stable")
    steps_N = gap * np.arange(len(order))
    blocks = []  # (mean of y - steps, size): least squares under an order, by pooling neighbours
    for y in np.asarray(y_N, float)[order] - steps_N:
        blocks.append((y, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((m * a + n * b) / (m + n), m + n)]
    placed_N = np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
    placed_N = np.clip(placed_N, low, max(low, high - steps_N[-1])) + steps_N
    return placed_N[np.argsort(order)]


def saved(figure, path: Path) -> None:
    """Write a figure as PNG of 256 colours, without overlapping labels of lines, and close it."""
    columns = {axis: [text for text in axis.texts if text.get_gid() == ENDS] for axis in figure.axes}
    figure.draw_without_rendering()  # the layout, on which heights depend
    for axis, texts in columns.items():
        if texts:
            box = axis.get_window_extent()
            ends = [text.xycoords.transform(text.xy)[1] for text in texts]
            line = 1.3 * SMALLEST / 72 * figure.dpi
            for text, y in zip(texts, spread(ends, line, box.y0, box.y1 - line / 2), strict=True):
                text.set_position((1.03, (y - box.y0) / box.height))
    figure.set_layout_engine("none")  # as it is: a second layout would take as long as the first
    drawn = io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    with Image.open(drawn) as image:  # a third of the bytes
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def draw(results: dict, path: Path, number: str = "") -> None:
    """Draw the figure of a study: training loss of its arms, and their differences with each pair of seeds.

    The axis of the differences is linear near zero and logarithmic beyond, because effects differ a hundredfold.

    Args:
        number: what is compared, with its unit; by default the name of the study's measure.
    """
    study = results["study"]
    rows = {arm: row for arm, row in results["table"].items() if row.get("difference") is not None}
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["difference"]))
    size = (11, max(3.8, 1.6 + 0.32 * len(rows)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(1, 1.1))
    _losses(left, results, max(rows, key=lambda arm: abs(rows[arm]["difference"]), default=None))
    for y, row in enumerate(rows.values()):
        colour, filled = ("#000000", "full") if row.get("resolved") else ("#888888", "none")
        if row["low"] is not None:
            right.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.5)
        right.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", color=colour, markersize=8)
        right.plot(row["difference"], y, "o", color=colour, markersize=5, fillstyle=filled)
    right.axvline(0, color="#888888", linewidth=0.8)
    right.set_xscale("symlog", linthresh=0.01)
    right.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    right.set_yticks(range(len(rows)), rows)
    right.set_ylim(-0.7, len(rows) - 0.3)
    right.grid(axis="x")
    number = number or study["measure"][0].replace("_", " ")
    right.set_xlabel(f"{number} minus {study['against']}'s\n(right: worse; ticks: seeds)")
    right.set_title("filled: resolved after Holm's correction")
    signs = [row["difference"] > 0 for row in rows.values() if row.get("resolved")]
    worse, better = sum(signs), len(signs) - sum(signs)
    titled(
        figure, results, f"{worse} of {len(rows)} arms resolved as worse than {study['against']}, {better} as better"
    )
    saved(figure, path)


def _losses(axis, results: dict, farthest: str | None) -> None:
    """Draw training loss, the mean over seeds: of the reference, of the arm farthest from it, and of all others."""
    study, styles = results["study"], {}
    styles[farthest] = {"color": "#444444", "linestyle": "--", "label": farthest}
    model = study["base"].get("model.name", "rwkv4")
    styles[study["against"]] = {"color": COLOURS.get(model, "#000000"), "label": study["against"]}
    for arm in sorted(results["table"], key=[*styles].__contains__):
        runs = [cell for name, cell in results["cells"].items() if name.startswith(f"{arm}, seed ")]
        curves = [run["curve"] for run in runs if "curve" in run and run.get("tokens") == runs[-1].get("tokens")]
        if curves:
            tokens = curves[0]["tokens"]  # seeds may have been logged at other steps
            loss = np.mean([np.interp(tokens, its["tokens"], its["loss_nats"]) for its in curves], axis=0)
            axis.plot(tokens, loss, **styles.get(arm, {"color": "#aaaaaa", "linewidth": 0.7}))
    axis.set(xlabel="training tokens", ylabel="training loss, nats a token", title="mean over seeds; grey: other arms")
    within_decades(axis.xaxis, EngFormatter(sep=" "))
    label_ends(axis)
