"""The tables of precision's results.json, in markdown.

python -m experiments.precision.table [results.json]
"""

from pathlib import Path

from experiments.results import print_table

HEADS = {"y": "y", "final": "final state"}  # all others are gradients


def render(results) -> str:
    """Return tables of each operator and dtype, its bounds, and the claims. T = 1 is in results.json alone."""
    lines = []
    for operator, bound in results["bounds"].items():
        of_operator = [row for row in results["rows"] if row["operator"] == operator and row["T"] > 1]
        for dtype in dict.fromkeys(row["dtype"] for row in of_operator):
            rows = [row for row in of_operator if row["dtype"] == dtype]
            lines += _tables(f"{operator}, {dtype} inputs: error", rows)
        lines.append(f"Bound of {operator}: {bound['bound']}; steps:")
        lines += [*(f"- {form}: {steps}" for form, steps in bound["steps"].items()), ""]
    lines += ["| claim | measured | at most |", "|---|---:|---:|"]
    lines += [f"| {what} | {measured:.2g} | {most:g} |" for what, measured, most in results["claims"]]
    stamp = results["stamp"]
    lines += [
        "",
        f"{stamp['processor']}, {stamp['cores']} cores; jax {stamp['versions']['jax']}, Python "
        f"{stamp['versions']['python']}; {stamp['date']}, commit {stamp['commit'] or 'none'}; "
        f"{results['wall_seconds']:.0f} s in all.",
    ]
    return "\n".join(lines)


def _tables(title, rows):
    heads = [HEADS.get(name, f"grad {name}") for name in rows[0]["errors"]]
    lines = []
    for relative_to, suffix in (("the exact result", ""), ("its magnitude", "_of_magnitude")):
        lines += [
            f"{title} relative to {relative_to}, rms over channels / worst channel",
            "",
            f"| T | form | {' | '.join(heads)} |{' of bound |' if suffix else ''}",
            f"|---:|---|{'---|' * len(heads)}{'---:|' if suffix else ''}",
            *(_line(row, suffix) for row in rows),
            "",
        ]
    return lines


def _line(row, suffix):
    pair = lambda e: (e["rms" + suffix], e["worst" + suffix])
    cells = ["0" if None in pair(e) else "{:.0e} / {:.0e}".format(*pair(e)) for e in row["errors"].values()]
    if suffix:
        cells.append(f"{max(row['share_of_bound'].values()):.2g}" if "share_of_bound" in row else "")
    return f"| {row['T']:,} | {row['side']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print_table(render, Path(__file__).parent)
