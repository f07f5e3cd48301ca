"""results.json as the table that a person reads.

python -m experiments.ablations.table [results.json]
"""

import json
import sys
from pathlib import Path


def render(results) -> str:
    """One row an arm, the largest difference first."""
    head = ("", "parameters", "FLOPs a token", "lr", "bits/byte", "minus released", "95 %", "p (Holm)")
    arms = sorted(results["arms"].items(), key=lambda item: -item[1].get("difference", float("inf")))
    rows = [head, *(_row(arm, row) for arm, row in arms)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    align = lambda row: "  ".join(
        f"{c:>{w}}" if i else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
    )
    lines = [align(row) for row in rows]
    fields, stamp = results["fields"], results["stamp"]
    rule = "-" * len(lines[0])
    notes = [
        f"{fields['num_layers']} x {fields['dim']}, {results['tokens']:,} training bytes, {len(fields['seeds'])} "
        f"pairs; windows of {fields['seq_len']} of held-out text ({fields['text']}).",
        "Intervals: the wider of Student's t over seeds and a bootstrap over documents.",
        f"*: resolved, p below 0.05 after Holm's correction for {len(results['arms']) - 1} comparisons.",
        f"{stamp['processor']}, {stamp['cores']} cores; jax {stamp['versions']['jax']}; {stamp['date']}; "
        f"{results['wall_seconds']:.0f} s in all.",
    ]
    return "\n".join([lines[0], rule, *lines[1:], rule, *notes])


def _row(arm, row):
    cells = [arm, f"{row['parameters']:,}", f"{row['flops_per_token'] / 1e6:.3f} M", f"{row['lr']:g}"]
    cells.append(f"{row['bits_per_byte']:.4f}")
    if "difference" not in row:
        return [*cells, "", "", ""]
    mark = "*" if row["resolved"] else ""
    interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
    return [*cells, f"{row['difference']:+.4f}{mark}", interval, f"{row['p_holm']:.2g}"]


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    print(render(json.loads(path.read_text())))
