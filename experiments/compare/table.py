"""The table of compare's results.json, as text.

python -m experiments.compare.table [results.json]
"""

from pathlib import Path

from experiments.results import print_table


def render(results) -> str:
    """Return the table, one column per arm, then the n-gram and xz levels and notes on the numbers."""
    arms, preset = results["arms"], results["preset"]
    best = lambda arm: "sliding window" if arm.startswith("transformer") else "state carried"
    rows = [
        ("", list(arms)),
        ("parameters", [f"{a['parameters']:,}" for a in arms.values()]),
        ("training FLOPs a token", [f"{a['flops_per_token'] / 1e6:.2f} M" for a in arms.values()]),
        ("training tokens", [f"{preset['tokens']:,}"] * len(arms)),
        ("learning rate", [f"{a['lr']:g}" for a in arms.values()]),
        ("bits/byte, windows", [f"{a['bits_per_byte']:.3f}" for a in arms.values()]),
        *[row for other in next(iter(arms.values()))["minus"] for row in _against(other, arms)],
        ("bits/byte, best practice", [f"{a['best_practice_bits_per_byte']:.3f}" for a in arms.values()]),
        ("  which is", [best(arm) for arm in arms]),
        ("training tokens/s", [f"{a['tokens_per_second']:,.0f}" for a in arms.values()]),
        ("  share of matmul peak", [f"{100 * a['share_of_peak']:.0f} %" for a in arms.values()]),
    ]
    for i, at in enumerate(next(iter(arms.values()))["decode"]):
        cells = [a["decode"][i] for a in arms.values()]
        rows.append(
            (
                f"decode after {at['context']:,}",
                [f"{c['tokens_per_second']:,.0f}/s, {_bytes(c['state_bytes'])}" for c in cells],
            )
        )
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  " + "".join(f"{cell:>20}" for cell in cells) for name, cells in rows]
    rule = "-" * len(lines[0])
    counted = ", ".join(f"{name} {bits:.3f}" for name, bits in results["counted"].items())
    corpus, stamp = results["corpus"], results["stamp"]
    notes = [
        f"Counting on the same {preset['tokens']:,} training bytes: {counted} bits/byte.",
        f"A demonstration: {preset['tokens']:,} tokens, one seed ({preset['seed']}), {preset['num_layers']} x "
        f"{preset['dim']}.",
        f"{corpus['test_bytes']:,} held-out bytes: the beginnings of {results['documents']} files of "
        f"{corpus['name']}.",
        *_warning(results),
        f"{stamp['processor']}, {stamp['cores']} cores, {results['matmul_peak_flops'] / 1e9:.0f} GFLOP/s matmul; "
        f"jax {stamp['versions']['jax']}, Python {stamp['versions']['python']}; {stamp['date']}, "
        f"commit {stamp['commit'] or 'none'}; {results['wall_seconds']:.0f} s in all.",
    ]
    return "\n".join([lines[0], rule, *lines[1:], rule, *notes])


def _warning(results):
    """Return a line if a transformer loses to counting, which then proves nothing about transformers."""
    name, level = next((n, bits) for n, bits in results["counted"].items() if n.endswith("-gram"))
    losing = [arm for arm, a in results["arms"].items() if a["bits_per_byte"] > level]
    if not losing:
        return []
    return [f"Too short to rank architectures: {' and '.join(losing)} did not pass the {name} of the same bytes."]


def _against(other, arms):
    """Return two rows: the difference of each arm from another one, and its interval; blank for that arm itself."""
    told, intervals = [], []
    for arm, its in arms.items():
        d = its["minus"][other]
        interval = "one file" if d["low"] is None else f"[{d['low']:+.3f}, {d['high']:+.3f}]"
        told.append("" if arm == other else f"{d['bits_per_byte']:+.3f}")
        intervals.append("" if arm == other else interval)
    return [(f"  minus {other}", told), ("    95 % over files", intervals)]


def _bytes(n):
    return f"{n / 1024:,.0f} KiB" if n < 2**20 else f"{n / 2**20:,.0f} MiB"


if __name__ == "__main__":
    print_table(render, Path(__file__).parent)
