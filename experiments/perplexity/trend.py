"""A difference against the number of training tokens: where it changes sign, and the straight line through it."""

from itertools import pairwise

import numpy as np
from scipy import stats


def crossings(gaps: dict) -> list[dict]:
    """Return the tokens at which a difference changes sign, and whether it is above 0 from there.

    Interpolates linearly in log tokens between the budgets.

    Args:
        gaps: {tokens: difference}, tokens ascending.
    """
    found = []
    for (low, before), (high, after) in pairwise(gaps.items()):
        if before * after < 0:
            share = before / (before - after)
            found.append({"tokens": float(low * (high / low) ** share), "then_above": after > 0})
    return found


def trend(gaps: dict, value: float) -> dict | None:
    """Return the least-squares line of a difference against log2 tokens, where it reaches `value`, and the stretch
    beyond the budgets where its band holds 0.

    None for fewer than three budgets. The 95 % intervals are Student's for one more run. They assume that budgets are
    independent, although runs that branch from one trunk are not, and that the line stays straight beyond them.
    """
    if len(gaps) < 3:
        return None
    x, y = np.log2(np.array(list(gaps), float)), np.array(list(gaps.values()))
    its = stats.linregress(x, y)
    t, spread = stats.t.ppf(0.975, len(x) - 2), np.square(x - x.mean()).sum()
    residual = np.sqrt(np.square(y - its.intercept - its.slope * x).sum() / (len(x) - 2))

    def bits(at):
        half = t * residual * np.sqrt(1 + 1 / len(x) + np.square(at - x.mean()) / spread)
        return its.intercept + its.slope * at + np.array([-half, 0 * at, half])

    at = np.linspace(x[0], x[-1] + 30, 4001)  # 30 doublings: to a billion times as many tokens
    low, line, high = bits(at)
    first = lambda where: float(2 ** at[np.argmax(where)]) if where.any() else None
    holds_0 = (at > x[-1]) & (low <= 0) & (high >= 0)
    no_longer = np.maximum.accumulate(holds_0) & ~holds_0
    return {
        "per_doubling": [its.slope - t * its.stderr, its.slope, its.slope + t * its.stderr],
        "tokens": [float(2 ** x[0]), float(2 ** x[-1])],
        "reaches_0": first(line >= 0),
        "holds_0": [first(holds_0), first(no_longer)],
        "reaches": {"value": value, "tokens": first(line >= value), "earliest": first(high >= value)},
    }


def told(its: dict) -> list[str]:
    """Return the results of `trend` in three sentences."""
    millions = lambda tokens: f"{tokens / 1e6:,.0f}" if tokens >= 1e9 else f"{tokens / 1e6:.3g}"
    m = lambda tokens: "no budget" if tokens is None else f"{millions(tokens)} million tokens"
    low, slope, high = its["per_doubling"]
    start, end = map(millions, its["tokens"])
    value, reaches = its["reaches"]["value"], its["reaches"]
    open_from, open_to = map(m, its["holds_0"])
    if not its["holds_0"][0]:
        decided = "excludes 0 everywhere: on this line each of them decides the sign."
    elif not its["holds_0"][1]:
        decided = f"holds 0 from {open_from} on: on this line no budget from there decides the sign."
    else:
        decided = f"holds 0 from {open_from} to {open_to}: on this line a budget outside decides the sign."
    earliest = reaches["earliest"]
    everywhere = earliest is not None and earliest <= its["tokens"][0]
    band = "its 95 % band " + ("holds" if everywhere else "first holds") + " that value "
    band += "everywhere" if everywhere else f"at {m(earliest)}"
    return [
        f"From {start} to {end} million tokens the difference changes by {slope:+.4f} [{low:+.4f}, {high:+.4f}] bits "
        "a byte with each doubling.",
        f"On a straight line it is first 0 or above at {m(its['reaches_0'])}, and first the paper's {value:+.3f} or "
        f"above at {m(reaches['tokens'])}; {band}.",
        f"Beyond these budgets the band {decided}",
    ]
