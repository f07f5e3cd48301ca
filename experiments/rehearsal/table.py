"""The table of docs/scale.md from results.json, in markdown.

python -m experiments.rehearsal.table [results.json]
"""

from pathlib import Path

from experiments.results import print_table

RESULTS = "[results.json](../experiments/rehearsal/results.json)"  # from docs/
HEADS = (
    "model",
    "slice, chips",
    "batch, rows a chip",
    "GiB a chip: all, parameters + optimiser / gradients / activations",
    "GB a step over the links",
    "seconds: compute / memory / links",
    "MFU",
    "tokens/s",
    "days to 332 G tokens",
)


def render(results) -> str:
    head = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    return "\n".join([*head, *(_line(row) for row in results["rows"]), "", *_footer(results["rows"])])


def _line(row):
    giga = lambda *names: f"{sum(row['memory'][name] for name in names) / 2**30:.2f}"
    seconds, (B, T) = row["seconds"], row["batch"]
    parts = (giga("parameters", "optimiser"), giga("gradients"), giga("activations"))
    links = f"{seconds['interconnect']:.3f}" + (f" + {seconds['network']:.3f}" if "network" in seconds else "")
    moved = f"{row['interconnect_bytes'] / 1e9:.1f}"
    if row["slices"] > 1:
        moved += f" + {row['network_bytes'] / 1e9:.2f}"
    notes = [f"remat {row['remat']}"] * (row["remat"] != "block")
    notes += [f"replicas {row['replicas']}"] * (row["replicas"] > 1)
    cells = [
        ", ".join([row["model"], *notes]),
        f"{row['target']}, {row['chips']}",
        f"{B} x {T:,}, {B // row['chips']}",
        f"{row['memory_needed'] / 2**30:.2f} of {row['memory_capacity'] / 2**30:.0f}: {' / '.join(parts)}",
        moved,
        f"{seconds['compute']:.3f} / {seconds['memory']:.3f} / {links}",
        f"{100 * row['mfu']:.0f} %",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['days_to_pile']:.1f}",
    ]
    return f"| {' | '.join(cells if row['fits'] else [*cells[:4], *['does not fit'] * 5])} |"


def _footer(rows):
    """Yield one line per set of versions that produced rows."""
    for made in sorted({(r["stamp"]["date"], r["stamp"]["versions"]["jax"], r["compiler"]) for r in rows}):
        date, jax, compiler = made
        yield f"Made {date} with jax {jax} and a libtpu that says: {compiler}. The commands are in {RESULTS}."


if __name__ == "__main__":
    print_table(render, Path(__file__).parent)
