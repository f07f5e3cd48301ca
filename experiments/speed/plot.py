"""The figures of `results.json`, one for each suite in it: train.png, decode.png, ops.png and startup.png.

python -m experiments.speed.plot [results.json [folder]]
"""

import json
import sys
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from experiments.figures import plt, saved

MARKERS = "osD^vP*X"


def draw_train(results, path) -> None:
    """Stacked bars of where the time of a step goes."""
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for y, row in enumerate(results["models"].values()):
        left = 0.0
        for i, (part, seconds) in enumerate(row["parts"].items()):
            label = {"WKV": "WKV or attention"}.get(part, part) if y == 0 else None
            bar = axis.barh(y, 1e3 * seconds, left=left, color=f"C{i}", label=label)
            axis.bar_label(bar, [f"{seconds / row['step_seconds']:.0%}"], label_type="center")
            left += 1e3 * seconds
        text = f"  {row['tokens_per_second']:,.0f} tokens/s\n  {row['share_of_peak']:.0%} of peak"
        axis.text(left, y, text, va="center", fontsize=8)
    axis.set_yticks(range(len(results["models"])), results["models"])
    axis.invert_yaxis()
    axis.margins(x=0.22)
    axis.set(xlabel="milliseconds a step", xlim=(0, None))
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _finish(figure, results, "{num_layers} x {dim}, V {vocab_size:,}, batch {batch}, T {seq_len:,}", path)


def draw_decode(results, path) -> None:
    """Time a token and state bytes against context, log-log; an empty context is drawn at 1 token."""
    rows = results["sweep"]["rows"]
    figure, (time, size) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for model, marker in zip(dict.fromkeys(row["model"] for row in rows), MARKERS, strict=False):
        its = [row for row in rows if row["model"] == model]
        contexts = [max(row["context"], 1) for row in its]
        time.plot(contexts, [1e3 * row["seconds"] for row in its], marker=marker, label=model)
        sizes = [row["state_bytes"] / 1e6 for row in its if "state_bytes" in row]  # none without a cache
        size.plot(contexts[: len(sizes)], sizes, marker=marker)
    for axis, label in ((time, "ms a token"), (size, "state, MB")):
        axis.set(xlabel="context, tokens (none is drawn at 1)", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    time.legend(frameon=False, fontsize=8)
    shape = results["sweep"]["shape"]
    _finish(figure, results | {"shape": shape}, "decoding, {num_layers} x {dim}, V {vocab_size:,}, {dtype}", path)


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
    title = title.format(**results.get("shape", {}))
    figure.suptitle(f"{title}; {device}, {stamp['date']}", fontsize=10)
    saved(figure, path)


DRAW = {"train": draw_train, "decode": draw_decode, "ops": draw_ops, "startup": draw_startup}

if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent
    measured = json.loads(source.read_text())
    for suite, draw in DRAW.items():
        if suite in measured:
            draw(measured[suite], folder / f"{suite}.png")
