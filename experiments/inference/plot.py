"""The figure of `results.json`: a token's cost against context, ratios beside the law, training against T."""

from experiments.figures import COLOURS, plt, saved

LINES = ("-", "--", ":")


def draw(results, path) -> None:
    """Write the figure as PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    (time_axis, memory_axis), (ratio_axis, training_axis) = axes
    shape = next(iter(results["fields"]["shapes"]))
    batches = results["fields"]["shapes"][shape]["batches"]
    for name, cell in results["cells"].items():
        parts = name.split(", ")
        if parts[0] != shape or not parts[-1].startswith("batch"):
            continue
        arm, batch = ", ".join(parts[1:-1]), int(parts[-1].split()[1])
        style = {"color": COLOURS[arm], "linestyle": LINES[batches.index(batch) % 3], "marker": ".", "linewidth": 1}
        rows = [row for row in cell["rows"] if row["position"]]
        at = [row["position"] for row in rows]
        time_axis.loglog(at, [1e3 * row["seconds"] for row in rows], label=f"{arm}, batch {batch}", **style)
        if batch == batches[0]:
            memory_axis.loglog(at, [row["memory_bytes"] / 2**20 for row in rows], label=arm, **style)
    time_axis.set(xlabel="tokens before", ylabel="ms a token", title=f"{shape}: time of a token, all texts of a batch")
    memory_axis.set(xlabel="tokens before", ylabel="MiB", title=f"memory without parameters, batch {batches[0]}")
    _ratios(ratio_axis, results, shape, batches)
    if any(name.startswith("training") for name in results["cells"]):
        _training(training_axis, results)
    else:
        training_axis.set_axis_off()
    time_axis.legend(frameon=False, fontsize=6, ncols=2, loc="upper center")
    time_axis.set_ylim(top=20 * time_axis.get_ylim()[1])  # room for the legend
    for axis in (memory_axis, ratio_axis, training_axis):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    saved(figure, path)


def _ratios(axis, results, shape, batches):
    for batch, line in zip(batches, LINES, strict=False):
        its = [r for r in results["ratios"] if r["shape"] == shape and r["batch"] == batch and r["position"]]
        cached = [r for r in its if r["baseline"] == "transformer"]
        at = [r["position"] for r in cached]
        axis.loglog(at, [r["law"] for r in cached], color="#bbbbbb", linestyle=line, linewidth=3)
        axis.loglog(at, [r["ratio"] for r in cached], color="#2c3e50", linestyle=line, marker=".", linewidth=1,
                    label=f"batch {batch}")  # fmt: skip
    for claim in results["claims"]:
        axis.loglog(claim["tokens"], claim["factor"], marker="*", color="#e67e22", markersize=10, linestyle="none")
    axis.set(
        xlabel="tokens before", ylabel="cached transformer / RWKV-4", title="ratio; grey: the law; stars: the claims"
    )


def _training(axis, results):
    memory = axis.twinx()
    for name, cell in results["cells"].items():
        if not name.startswith("training, "):
            continue
        arm = name.removeprefix("training, ")
        style = {"color": COLOURS[arm.split(", ")[0]], "linestyle": "--" if "associative" in arm else "-"}
        at, speed, mib = zip(
            *((row["T"], row["tokens_per_second"], row["temporary_bytes"] / 2**20) for row in cell["rows"]),
            strict=True,
        )
        axis.semilogx(at, speed, marker=".", label=arm, **style)
        axis.set_xticks(at, [f"{T:,}" for T in at], minor=False)
        axis.minorticks_off()
        memory.semilogx(at, mib, linewidth=0.5, marker="x", markersize=4, **style)
    axis.set(
        xlabel="T, at equal B T", ylabel="tokens/s", title="training; thin, crosses: temporary memory", ylim=(0, None)
    )
    memory.set(ylabel="MiB", ylim=(0, None))
