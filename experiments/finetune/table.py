"""results.json as the table that a person reads.

python -m experiments.finetune.table [results.json]
"""

import json
import sys
from pathlib import Path


def render(results) -> str:
    """One row an arm, then what the numbers are."""
    head = (
        "",
        "trained",
        "lr",
        "new text",
        "minus none",
        "95 %",
        "minus full",
        "95 %",
        "old text",
        "minus none",
        "95 %",
    )
    rows = [head]
    for arm, row in results["arms"].items():
        new, old = row["new"], row["old"]
        cells = [arm, f"{row['trained']:,}", f"{row['lr']:g}" if "lr" in row else ""]
        cells += [f"{new['bits_per_byte']:.3f}", *_change(new["minus_none"]), *_change(new["minus_full"])]
        rows.append([*cells, f"{old['bits_per_byte']:.3f}", *_change(old["minus_none"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    preset, stamp, texts = results["preset"], results["stamp"], results["texts"]
    tokens = preset["steps"] * preset["batch_size"] * preset["seq_len"]
    notes = [
        f"Bits per byte of held-out text, windows of {preset['seq_len']}; intervals: paired bootstrap over documents.",
        *(
            f"{name} text: {t['held_out']:,} bytes, the beginnings of {t['documents']} documents of {t['name']}."
            for name, t in texts.items()
        ),
        f"Each arm: {tokens:,} tokens, {tokens / results['train_tokens_of_new']:.2f} epochs, at the best of "
        f"{preset['rates']} learning rates{_at_an_end(results)}; a model of {results['parameters']:,} parameters.",
        f"{stamp['processor']}, {stamp['cores']} cores; jax {stamp['versions']['jax']}, Python "
        f"{stamp['versions']['python']}; {stamp['date']}, commit {stamp['commit'] or 'none'}; one seed "
        f"({preset['seed']}); {results['wall_seconds']:.0f} s in all.",
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:], rule, *notes])


def _change(found):
    value, low, high = found
    if value == 0:
        return "", ""
    return f"{value:+.3f}", "one file" if low is None else f"[{low:+.3f}, {high:+.3f}]"


def _at_an_end(results):
    """Arms whose best rate is the lowest or the highest tried: a wider search may do better."""
    tried = {arm: sorted(map(float, row.get("validation_bits_per_byte", ()))) for arm, row in results["arms"].items()}
    ends = [arm for arm, lrs in tried.items() if len(lrs) > 2 and results["arms"][arm]["lr"] in (lrs[0], lrs[-1])]
    return f" (at an end of them: {'; '.join(ends)})" if ends else ""


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.json")
    print(render(json.loads(path.read_text())))
