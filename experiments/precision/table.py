"""results.json as the tables that a person reads, in markdown.

python -m experiments.precision.table [results.json]
"""

from pathlib import Path

from experiments import command

HEADS = {"y": "y", "w": "grad w", "u": "grad u", "k": "grad k", "v": "grad v"}


def render(results) -> str:
    """Tables for each dtype of inputs, the bounds, and whether they hold. One token is in results.json alone."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["dtype"] == dtype and row["T"] > 1]
        for relative_to, suffix in (("the exact result", ""), ("its magnitude", "_of_magnitude")):
            lines += [
                f"{dtype} inputs: error relative to {relative_to}, rms over channels / worst channel",
                "",
                f"| T | form | {' | '.join(HEADS.values())} |{' of bound |' if suffix else ''}",
                f"|---:|---|{'---|' * len(HEADS)}{'---:|' if suffix else ''}",
                *(_line(row, suffix) for row in rows),
                "",
            ]
    lines.append("Bound: eps (2 steps + spread of log weights + 16), eps T more for the gradients of w and u; steps:")
    lines += [f"- {form}: {steps}" for form, steps in results["steps"].items()]
    lines += ["", "| claim | measured | at most |", "|---|---:|---:|"]
    lines += [f"| {what} | {measured:.2g} | {most:g} |" for what, measured, most in results["claims"]]
    stamp = results["stamp"]
    lines += [
        "",
        f"{stamp['processor']}, {stamp['cores']} cores; jax {stamp['versions']['jax']}, Python "
        f"{stamp['versions']['python']}; {stamp['date']}, commit {stamp['commit'] or 'none'}; "
        f"{results['wall_seconds']:.0f} s in all.",
    ]
    return "\n".join(lines)


def _line(row, suffix):
    errors = [row["errors"][name] for name in HEADS]
    cells = [f"{e['rms' + suffix]:.0e} / {e['worst' + suffix]:.0e}" for e in errors]
    if suffix:
        cells.append(f"{max(row['share_of_bound'].values()):.2g}" if "share_of_bound" in row else "")
    return f"| {row['T']:,} | {row['side']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    command.print_table(render, Path(__file__).parent)
