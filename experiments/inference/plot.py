"""The figure of `results.json`: a token's cost against context, ratios beside the law, training against T."""

from matplotlib.ticker import NullFormatter

from experiments.figures import COLOURS, label_ends, panels, saved, style, titled
from experiments.results import redraw

LINES = ("-", "--", ":")


def draw(results, path) -> None:
    """Write the figure as PNG: three panels of decoding, and two of training where it was measured."""
    cells = results["cells"]
    training = {name.removeprefix("training, "): cell["rows"] for name, cell in cells.items() if "training, " in name}
    figure, axes = panels(3, 2 if training else 1, width=4.3, height=3.7)
    time_axis, memory_axis, ratio_axis = axes[0]
    shape, its = next(iter(results["fields"]["shapes"].items()))
    for number, batch in enumerate(its["batches"]):
        for arm in COLOURS:
            rows = cells.get(f"{shape}, {arm}, batch {batch}", {"rows": []})["rows"]
            rows = [row for row in rows if row["position"]]
            at = [row["position"] for row in rows]
            line = style(arm) | {"linestyle": LINES[number]}
            line["label"] = f"{_short(arm)}, batch {batch}" if number in (0, len(its["batches"]) - 1) else None
            time_axis.loglog(at, [1e3 * row["seconds"] for row in rows], **line)
            if not number:
                line["label"] = _short(arm)
                memory_axis.loglog(at, [row["memory_bytes"] / 2**20 for row in rows], **line)
        _ratios(ratio_axis, results, shape, batch, LINES[number])
    styles = ", ".join(
        f"{name} {batch}" for name, batch in zip(("line: batch", "dashes:", "dots:"), its["batches"], strict=False)
    )
    time_axis.set(ylabel="ms", title=f"time of a token; {styles}")
    memory_axis.set(ylabel="MiB", title=f"memory without parameters, batch {its['batches'][0]}")
    for claim in results["claims"]:
        ratio_axis.loglog(claim["tokens"], claim["factor"], marker="*", color="#d55e00", markersize=10)
    ratio_axis.set(ylabel="cached transformer / RWKV-4", title="ratio of times; grey: law; stars: claims")
    for axis in axes[0]:
        axis.set_xlabel("tokens of context")
        label_ends(axis)
    if training:
        _training(axes[1], training)
    measured = cells[
        f"{shape}, rwkv4, batch {its['batches'][0]}"
    ]  # has the device; results may be concluded elsewhere
    titled(figure, {"stamp": measured}, _finding(results, shape, its["batches"][0]), shape)
    saved(figure, path)


def _short(arm: str) -> str:
    return arm.replace("transformer, no cache", "no cache")


def _of_cached(results, shape, batch) -> list[dict]:
    ratios = results["ratios"]
    its = [row for row in ratios if (row["shape"], row["batch"], row["baseline"]) == (shape, batch, "transformer")]
    return [row for row in its if row["position"]]


def _finding(results, shape, batch) -> str:
    rows = _of_cached(results, shape, batch)
    if not rows:
        return "Time and memory of a token against context"
    last = max(rows, key=lambda row: row["position"])
    after = f"After {last['position']:,} tokens at batch {batch}"
    return f"{after} a transformer with a cache takes {last['ratio']:.2g} times RWKV-4's time for a token"


def _ratios(axis, results, shape, batch, line):
    its = _of_cached(results, shape, batch)
    at = [row["position"] for row in its]
    axis.loglog(at, [row["law"] for row in its], color="#cccccc", linestyle=line, linewidth=3)
    ratios = [row["ratio"] for row in its]
    axis.loglog(at, ratios, color="#000000", linestyle=line, marker=".", label=f"batch {batch}")


def _training(axes, its):
    speed_axis, memory_axis, left_out = axes
    left_out.set_axis_off()
    for arm, rows in its.items():
        line = style(arm.split(", ")[0]) | {"linestyle": "--" if "associative" in arm else "-", "label": arm}
        at = [row["T"] for row in rows]
        speed_axis.plot(at, [row["tokens_per_second"] for row in rows], **line)
        memory_axis.plot(at, [row["temporary_bytes"] / 2**20 for row in rows], **line)
    for axis in (speed_axis, memory_axis):
        axis.set(xscale="log", xlabel="T, tokens, at equal B T", ylim=(0, None))
        axis.set_xticks(at, [f"{T:,}" for T in at])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
        label_ends(axis)
    speed_axis.set(ylabel="tokens/s", title="training speed")
    memory_axis.set(ylabel="MiB", title="temporary memory of a training step")


if __name__ == "__main__":
    redraw("inference")
