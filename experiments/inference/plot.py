"""The figure of `results.json`: a token's cost against context, ratios beside the law, training against T."""

from experiments.figures import COLOURS, panels, saved
from experiments.results import redraw

LINES = ("-", "--", ":")


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, [(time_axis, memory_axis), (ratio_axis, training_axis)] = panels(2, 2, width=5.5)
    shape, its = next(iter(results["fields"]["shapes"].items()))
    for number, batch in enumerate(its["batches"]):
        for arm in COLOURS:
            cell = results["cells"].get(f"{shape}, {arm}, batch {batch}", {"rows": []})
            rows = [row for row in cell["rows"] if row["position"]]
            at = [row["position"] for row in rows]
            style = {"color": COLOURS[arm], "linestyle": LINES[number], "marker": ".", "linewidth": 1}
            if rows:
                seconds = [1e3 * row["seconds"] for row in rows]
                time_axis.loglog(at, seconds, label=f"{arm}, batch {batch}", **style)
            if rows and not number:
                memory_axis.loglog(at, [row["memory_bytes"] / 2**20 for row in rows], label=arm, **style)
        _ratios(ratio_axis, results, shape, batch, LINES[number])
    time_axis.set(xlabel="tokens before", ylabel="ms a token", title=f"{shape}: time of a token, all texts of a batch")
    time_axis.legend(frameon=False, fontsize=6, ncols=2, loc="upper center")
    time_axis.set_ylim(top=20 * time_axis.get_ylim()[1])  # room for the legend
    memory_axis.set(xlabel="tokens before", ylabel="MiB", title="memory without parameters, first batch")
    for claim in results["claims"]:
        ratio_axis.loglog(claim["tokens"], claim["factor"], marker="*", color="#e67e22", markersize=10)
    ratio_axis.set(xlabel="tokens before", ylabel="cached transformer / RWKV-4")
    ratio_axis.set_title("ratio; grey: the law; stars: the claims")
    _training(training_axis, results["cells"])
    for axis in (memory_axis, ratio_axis, training_axis):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    saved(figure, path)


def _ratios(axis, results, shape, batch, line):
    its = [r for r in results["ratios"] if (r["shape"], r["batch"], r["baseline"]) == (shape, batch, "transformer")]
    its = [r for r in its if r["position"]]
    at = [r["position"] for r in its]
    axis.loglog(at, [r["law"] for r in its], color="#bbbbbb", linestyle=line, linewidth=3)
    style = {"color": "#2c3e50", "linestyle": line, "marker": ".", "linewidth": 1}
    axis.loglog(at, [r["ratio"] for r in its], label=f"batch {batch}", **style)


def _training(axis, cells):
    its = {
        name.removeprefix("training, "): cell["rows"] for name, cell in cells.items() if name.startswith("training")
    }
    if not its:
        axis.set_axis_off()
        return
    memory = axis.twinx()
    for arm, rows in its.items():
        style = {"color": COLOURS[arm.split(", ")[0]], "linestyle": "--" if "associative" in arm else "-"}
        at = [row["T"] for row in rows]
        axis.semilogx(at, [row["tokens_per_second"] for row in rows], marker=".", label=arm, **style)
        mib = [row["temporary_bytes"] / 2**20 for row in rows]
        memory.semilogx(at, mib, linewidth=0.5, marker="x", markersize=4, **style)
    axis.set_xticks(at, [f"{T:,}" for T in at])
    axis.minorticks_off()
    axis.set(xlabel="T, at equal B T", ylabel="tokens/s", ylim=(0, None))
    axis.set_title("training; thin, crosses: temporary memory")
    memory.set(ylabel="MiB", ylim=(0, None))


if __name__ == "__main__":
    redraw("inference")
