"""The figures of `results.json`: ops.png and startup.png, as far as their suites are in it.

python -m experiments.speed.plot [results.json [folder]]
"""

import sys
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from experiments.figures import plt, saved
from rwkv_jax.command import end, reported
from rwkv_jax.files import read_json, user_path

MARKERS = "osD^vP*X"


def draw_ops(results, path) -> None:
    """Time a token, forward and with the backward pass, and the share of copy bandwidth, against T.

    Of the sizes, the one that has most lengths.
    """
    rows = [row for row in results["rows"] if row["seconds"]]
    lengths = {}
    for row in rows:
        lengths.setdefault(tuple(row["shape"][2:]), set()).add(row["shape"][1])
    dim, dtype = max(lengths, key=lambda size: len(lengths[size]))
    rows = [row for row in rows if row["shape"][2:] == [dim, dtype]]
    a_token = lambda row: 1e9 * row["seconds"] / (row["shape"][0] * row["shape"][1])
    panels = (
        ("forward: ns a token", "forward", a_token),
        ("forward and backward: ns a token", "both", a_token),
        ("share of copy bandwidth, both", "both", lambda row: row["share_of_copy"]),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for axis, (label, which, value) in zip(axes, panels, strict=True):
        for form, marker in zip(dict.fromkeys(row["form"] for row in rows), MARKERS, strict=False):
            its = [row for row in rows if (row["form"], row["pass"]) == (form, which)]
            points = sorted((row["shape"][1], value(row)) for row in its)
            axis.plot([T for T, _ in points], [y for _, y in points], marker=marker, label=form)
        axis.set(xlabel="T, tokens", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[2].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].legend(frameon=False, fontsize=8)
    _finish(figure, results, f"WKV, D {dim}, {dtype}", path)


def draw_startup(results, path) -> None:
    """Stacked bars of tracing, lowering and compiling, a panel a size; what it is compared with is paler."""
    sizes = list(dict.fromkeys(row["size"] for row in results["rows"]))
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 3.4), layout="constrained", squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        rows = [row for row in results["rows"] if row["size"] == size]
        names = [f"{row['program']}, {row['layout']}" for row in rows]
        for side, shift, alpha in (("ours", -0.2, 1.0), ("before", 0.2, 0.4)):
            bars = [(y + shift, row[side]) for y, row in enumerate(rows) if side in row]
            for i, part in enumerate(("trace", "lower", "compile")):
                left = [sum(list(seconds.values())[:i]) for _, seconds in bars]
                widths = [seconds[part] for _, seconds in bars]
                axis.barh([y for y, _ in bars], widths, 0.36, left, color=f"C{i}", alpha=alpha, label=part)
            totals = [f" {sum(seconds.values()):.1f}" for _, seconds in bars]
            axis.bar_label(axis.containers[-1], totals, fontsize=7)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(title=size, xlabel="seconds", xlim=(0, None))
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[:3], names[:3], frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    paler = f", paler: {results['against']}" if results["against"] else ""
    _finish(figure, results, f"before the first result{paler}", path)


def _finish(figure, results, title, path):
    stamp = results["stamp"]
    device = f"{stamp['cores']} CPU cores" if stamp["devices"] == ["cpu"] else ", ".join(stamp["devices"])
    figure.suptitle(f"{title}; {device}, {stamp['date']}", fontsize=10)
    saved(figure, path)


DRAW = {"ops": draw_ops, "startup": draw_startup}


@reported()
def main(argv=None) -> None:
    source = user_path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("results.json"))
    folder = user_path(sys.argv[2] if len(sys.argv) > 2 else source.parent)
    measured = read_json(source)
    for suite, draw in DRAW.items():
        if suite in measured:
            draw(measured[suite], folder / f"{suite}.png")


if __name__ == "__main__":
    end(main())
