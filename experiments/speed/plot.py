"""The figures of `results.json`, one for each suite in it: train.png, decode.png, ops.png and startup.png.

python -m experiments.speed.plot [results.json [folder]]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
MARKERS = "osD^vP*X"


def style(i, **more):
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5} | more


def draw_train(results, path) -> None:
    """Stacked bars of where the time of a step goes."""
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    order = ("matmuls", "WKV or attention", "elementwise and rest", "optimiser")
    for y, row in enumerate(results["models"].values()):
        parts = {"WKV or attention" if name in ("WKV", "attention") else name: t for name, t in row["parts"].items()}
        left = 0.0
        for i, name in enumerate(order):
            width = max(1e3 * parts[name], 0)  # a remainder may come out below zero by noise
            axis.barh(y, width, left=left, color=COLOURS[i], label=name if y == 0 else None)
            if width > 30e-3 * 1e3 * row["step_seconds"]:
                axis.text(left + width / 2, y, f"{width / 1e3 / row['step_seconds']:.0%}", ha="center", va="center")
            left += width
        label = f"  {row['tokens_per_second']:,.0f} tokens/s\n  {row['share_of_peak']:.0%} of peak"
        axis.text(left, y, label, va="center", fontsize=8)
    axis.set_yticks(range(len(results["models"])), results["models"])
    axis.invert_yaxis()
    axis.margins(x=0.22)
    axis.set_xlim(left=0)
    axis.set_xlabel("milliseconds a step")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    shape = results["shape"]
    title = f"{shape['num_layers']} x {shape['dim']}, V {shape['vocab_size']:,}, batch {shape['batch']}, "
    _finish(figure, results, title + f"T {shape['seq_len']:,}, {shape['dtype']}", path)


def draw_decode(results, path) -> None:
    """Time a token and state bytes against context, log-log; an empty context is drawn at 1 token."""
    sweep = results["sweep"]
    figure, (time, size) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, (model, batch) in enumerate(dict.fromkeys((r["model"], r["batch"]) for r in sweep["rows"])):
        rows = [r for r in sweep["rows"] if (r["model"], r["batch"]) == (model, batch)]
        several = len({r["batch"] for r in sweep["rows"]}) > 1
        look = style(i, label=f"{model}, batch {batch}" if several else model)
        contexts = [max(r["context"], 1) for r in rows]
        time.plot(contexts, [1e3 * r["seconds"] for r in rows], **look)
        if "state_bytes" in rows[0]:
            size.plot(contexts, [r["state_bytes"] / 1e6 for r in rows], **look)
    time.set_ylabel("ms a token")
    size.set_ylabel("state, MB")
    for axis in (time, size):
        axis.set(xlabel="context, tokens (none is drawn at 1)", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    time.legend(frameon=False, fontsize=8)
    shape = sweep["shape"]
    title = f"decoding, {shape['num_layers']} x {shape['dim']}, V {shape['vocab_size']:,}, {shape['dtype']}"
    _finish(figure, results, title, path)


def draw_ops(results, path) -> None:
    """Time a token, forward and with the backward pass, and the share of copy bandwidth, against T.

    Of the sizes, the one that has most lengths.
    """
    rows = [r for r in results["rows"] if r["seconds"]]
    sizes = [(r["shape"][2], r["shape"][3]) for r in rows]
    lengths = lambda size: len({r["shape"][1] for r in rows if (r["shape"][2], r["shape"][3]) == size})
    dim, dtype = max(dict.fromkeys(sizes), key=lengths)
    rows = [r for r in rows if r["shape"][2:] == [dim, dtype]]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for i, form in enumerate(dict.fromkeys(r["form"] for r in rows)):
        for axis, which, value in (
            (axes[0], "forward", lambda r: 1e9 * r["seconds"] / (r["shape"][0] * r["shape"][1])),
            (axes[1], "both", lambda r: 1e9 * r["seconds"] / (r["shape"][0] * r["shape"][1])),
            (axes[2], "both", lambda r: r["share_of_copy"]),
        ):
            points = sorted((r["shape"][1], value(r)) for r in rows if r["form"] == form and r["pass"] == which)
            if points:
                axis.plot(*zip(*points, strict=True), **style(i, label=form))
    for axis, label in zip(
        axes, ("forward: ns a token", "forward and backward: ns a token", "share of copy bandwidth, both"), strict=True
    ):
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
        sides = [side for side in ("ours", "before") if side in rows[0]]
        for y, row in enumerate(rows):
            for j, side in enumerate(sides):
                left = 0.0
                for i, part in enumerate(("trace", "lower", "compile")):
                    seconds = row[side][part]
                    place, height = y + (j - (len(sides) - 1) / 2) * 0.4, 0.36
                    axis.barh(place, seconds, height, left, color=COLOURS[i], alpha=0.4 if side == "before" else 1)
                    left += seconds
                axis.text(left, place, f" {left:.1f}", va="center", fontsize=7)
        axis.set_yticks(range(len(rows)), [f"{row['program']}, {row['layout']}" for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(title=size, xlabel="seconds", xlim=(0, None))
    names = {"trace": "tracing", "lower": "lowering", "compile": "compiling"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[i]) for i in range(3)]
    figure.legend(handles, names.values(), frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    paler = f", paler: {results['against']}" if results["against"] else ""
    _finish(figure, results, f"before the first result{paler}", path)


def _finish(figure, results, title, path):
    stamp = results["stamp"]
    device = f"{stamp['cores']} CPU cores" if stamp["devices"] == ["cpu"] else ", ".join(stamp["devices"])
    figure.suptitle(f"{title}; {device}, {stamp['date']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


DRAW = {"train": draw_train, "decode": draw_decode, "ops": draw_ops, "startup": draw_startup}

if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent
    measured = json.loads(source.read_text())
    for suite, draw in DRAW.items():
        if suite in measured:
            draw(measured[suite], folder / f"{suite}.png")
