"""Text from results.json: levels and differences at each budget, crossings, the trend, and samples."""

from experiments.engineering import table
from experiments.perplexity import trend
from experiments.statistics import millions, told_row


def levels(results: dict) -> str:
    """Return a table with a row per arm and reference level and a column per budget, and each arm's level at best
    practice (`measures.best_practice`) at its largest budget."""
    tokens = {point["budget"]: point["tokens"] for its in results["points"].values() for point in its}
    told_level = lambda bits: "" if bits is None else f"{bits:.3f}"
    cells = lambda of: [told_level(of.get(budget)) for budget in sorted(tokens)]
    rows = [
        (arm, *cells({point["budget"]: point["bits_per_byte"] for point in its}), told_level(its[-1]["best_practice"]))
        for arm, its in results["points"].items()
        if its
    ]
    counted = {int(budget): row for budget, row in results["cells"]["counted"]["budgets"].items()}
    for name in ("6-gram", "xz"):
        rows.append((name, *cells({budget: row[name] for budget, row in counted.items()}), ""))
    return table(("bits a byte", *(_column(tokens[budget]) for budget in sorted(tokens)), "best practice"), rows)


def _column(tokens: float) -> str:
    return f"{millions(tokens)} tokens"


def differences(results: dict) -> str:
    """Return a table with a row per pair of arms, a column per budget, and the tokens of each change of sign.

    A dagger marks the differences where an arm of the two is behind the 6-gram.
    """
    tokens = sorted({int(at) for rows in results["pairs"].values() for at in rows})
    head, rows = ("bits a byte", *map(_column, tokens), "overtaken at"), []
    for pair, its in ((pair, its) for pair, its in results["pairs"].items() if its):
        behind = max(results["behind_the_6-gram_until"][arm] for arm in pair.split(" minus "))
        of = {int(at): told_row(row) + " †" * (int(at) <= behind) for at, row in its.items()}
        told_crossing = lambda its: millions(its["tokens"], 2) + ", not resolved" * (not its["is_resolved"])
        crossed = "; ".join(map(told_crossing, results["overtakes"][pair]))
        rows.append((pair, *(of.get(at, "") for at in tokens), crossed))
    return table(head, rows)


def sentences(results: dict) -> str:
    if results["trend"] is None:
        return "RWKV-4 minus transformer: too few budgets yet for a trend."
    return "RWKV-4 minus transformer: " + " ".join(trend.told(results["trend"]))


def samples(results: dict) -> str:
    """Return the text that the first seed of each arm generates after the same words, at its largest budget."""
    found = {}
    for name, cell in results["cells"].items():
        if "sample" in cell and ", seed 0" in name:
            arm, budget = name.split(", seed ")[0], millions(cell["tokens"])
            found[arm] = (arm, budget, f"`{' '.join(cell['sample'].split()).replace('`', chr(39))}`")
    return table(("arm", "tokens", "text"), found.values())
