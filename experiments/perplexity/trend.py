"""A difference against the number of training tokens: where it changes sign, and the straight line through it."""

from itertools import groupby, pairwise

import numpy as np
from scipy import stats

from experiments.statistics import Spread


def crossings(gaps: dict, resolved: set) -> list[dict]:
    """Return the tokens at which a difference changes sign, and whether it is above 0 from there.

    Interpolates linearly in log tokens between the budgets. A crossing is resolved if budgets on both sides of it are,
    each up to the next crossing.

    Args:
        gaps: {tokens: difference}, tokens ascending.
        resolved: tokens at which the interval of the difference excludes 0.
    """
    stretches = [dict(its) for _, its in groupby(gaps.items(), key=lambda item: item[1] > 0)]
    found = []
    for earlier, later in pairwise(stretches):
        (low, before), (high, after) = list(earlier.items())[-1], next(iter(later.items()))
        tokens = float(low * (high / low) ** (before / (before - after)))
        is_resolved = bool(resolved & earlier.keys() and resolved & later.keys())
        found.append({"tokens": tokens, "then_above": after > 0, "is_resolved": is_resolved})
    return found


def trend(gaps: dict, value: float, spread: Spread | None = None) -> dict | None:
    """Return the least-squares line of a difference against log2 tokens, where it reaches `value`, and the stretch
    beyond the budgets where its band holds 0.

    None for fewer than three budgets. The 95 % intervals are Student's for one more run, with the variance of the
    residuals and that of `spread` pooled, or of the residuals alone where these are larger by an F test (p < 0.05),
    because the differences bend. They assume that budgets are independent, although runs that branch from one trunk
    are not, and that the line stays straight beyond them.

    Args:
        spread: of the differences over seeds.
    """
    if len(gaps) < 3:
        return None
    x, y = np.log2(np.array(list(gaps), float)), np.array(list(gaps.values()))
    its = stats.linregress(x, y)
    squares, freedom = np.square(y - its.intercept - its.slope * x).sum(), len(x) - 2
    if spread and stats.f.sf(squares / freedom / spread.deviation**2, freedom, spread.freedom) >= 0.05:
        squares, freedom = squares + spread.freedom * spread.deviation**2, freedom + spread.freedom
    half_of_one = stats.t.ppf(0.975, freedom) * np.sqrt(squares / freedom)
    width = np.square(x - x.mean()).sum()

    def bits(at):
        half = half_of_one * np.sqrt(1 + 1 / len(x) + np.square(at - x.mean()) / width)
        return its.intercept + its.slope * at + np.array([-half, 0 * at, half])

    at = np.linspace(x[0], x[-1] + 30, 4001)  # 30 doublings: to a billion times as many tokens
    low, line, high = bits(at)
    first = lambda where: float(2 ** at[np.argmax(where)]) if where.any() else None
    holds_0 = (at > x[-1]) & (low <= 0) & (high >= 0)
    no_longer = np.maximum.accumulate(holds_0) & ~holds_0
    return {
        "per_doubling": [float(its.slope + sign * half_of_one / np.sqrt(width)) for sign in (-1, 0, 1)],
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
        decided = "excludes 0 everywhere: on this line the sign is known."
    elif not its["holds_0"][1]:
        decided = f"holds 0 from {open_from} on: from there the sign is open."
    else:
        decided = f"holds 0 from {open_from} to {open_to}: there the sign is open."
    earliest = reaches["earliest"]
    everywhere = earliest is not None and earliest <= its["tokens"][0]
    band = "its 95 % band " + ("holds" if everywhere else "first holds") + " that value "
    band += "everywhere" if everywhere else f"at {m(earliest)}"
    return [
        f"From {start} to {end} million tokens the difference changes by {slope:+.4f} [{low:+.4f}, {high:+.4f}] bits "
        "a byte with each doubling.",
        f"On a straight line it is first 0 or more at {m(its['reaches_0'])}, and the paper's {value:+.3f} or more at "
        f"{m(reaches['tokens'])}; {band}.",
        f"Beyond these budgets the band {decided}",
    ]
