"""Text from results.json: differences at each budget, crossings, the trend, and samples."""

from experiments.engineering import table
from experiments.perplexity import trend
from experiments.statistics import told


def differences(results: dict) -> str:
    """Return a table with a row per pair of arms, a column per budget, and the tokens of each change of sign."""
    tokens = sorted({int(at) for rows in results["pairs"].values() for at in rows})
    head = ("bits a byte", *(f"{at / 1e6:.3g} M tokens" for at in tokens), "overtaken at")
    rows = []
    for pair, its in results["pairs"].items():
        of = {int(at): told(*(row[x] for x in ("difference", "low", "high"))) for at, row in its.items()}
        crossed = ", ".join(f"{where['tokens'] / 1e6:.2g} M" for where in results["overtakes"][pair])
        rows.append((pair, *(of.get(at, "") for at in tokens), crossed))
    return table(head, rows)


def sentences(results: dict) -> str:
    if results["trend"] is None:
        return "RWKV-4 minus transformer: too few budgets yet for a trend."
    return "RWKV-4 minus transformer: " + " ".join(trend.told(results["trend"]))


def samples(results: dict) -> str:
    """Return the text that each arm generates after the same words, at its largest budget."""
    found = {}
    for name, cell in results["cells"].items():
        if "sample" in cell:
            arm, budget = name.split(", seed ")[0], f"{cell['tokens'] / 1e6:.3g} M"
            found[arm] = (arm, budget, f"`{' '.join(cell['sample'].split()).replace('`', chr(39))}`")
    return table(("arm", "tokens", "text"), found.values())
