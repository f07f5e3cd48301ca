"""Intervals of paired differences, verdicts on them, and corrections for multiple comparisons."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST = 6  # documents of an interval: of fewer, all are on one side of their median in more than 5 % of samples


class Spread(NamedTuple):
    """The standard deviation of paired differences over seeds, and its degrees of freedom."""

    deviation: float
    freedom: int


def pooled(levels_AS) -> Spread | None:
    """Return the spread of the difference of any two arms, estimated from the levels of all arms [A, S] by seed.

    The analysis of variance of a randomised block design, with seeds as blocks: two times the variance that is left
    after the mean of each arm and each seed, with (A - 1) (S - 1) degrees of freedom. Assumes that seeds move all arms
    alike, up to noise of one variance. None for fewer than two arms or seeds.
    """
    x = np.asarray(levels_AS, float)
    if min(x.shape) < 2:
        return None
    left_AS = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    freedom = (x.shape[0] - 1) * (x.shape[1] - 1)
    return Spread(float(np.sqrt(2 * np.square(left_AS).sum() / freedom)), freedom)


def t_interval(differences: Sequence[float], spread: Spread | None = None) -> tuple[float, float, float]:
    """Return the mean of paired differences, one per seed, and its 95 % interval by Student's t.

    The interval is NaN without seeds, or with one seed and no `spread`.

    Args:
        spread: by default that of `differences`.
    """
    x = np.asarray(differences, float)
    if len(x) < (1 if spread else 2):
        return float(x[0]) if len(x) else np.nan, np.nan, np.nan
    deviation, freedom = spread or _spread(x)
    half = stats.t.ppf(0.975, freedom) * deviation / np.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def p_value(differences: Sequence[float], spread: Spread | None = None) -> float:
    """Return the two-sided p of a mean of 0 under Student's t, NaN where `t_interval` has no interval; 0 for nonzero
    differences that all are the same, without `spread`."""
    x = np.asarray(differences, float)
    if len(x) < (1 if spread else 2):
        return np.nan
    deviation, freedom = spread or _spread(x)
    if deviation == 0:
        return float(x.mean() == 0)
    return float(2 * stats.t.sf(abs(x.mean()) * np.sqrt(len(x)) / deviation, freedom))


def _spread(differences_S: np.ndarray) -> Spread:
    is_equal = np.ptp(differences_S) == 0  # whose rounded mean gives a deviation above 0
    return Spread(0.0 if is_equal else float(differences_S.std(ddof=1)), len(differences_S) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): one below 0.05 is below 0.05 for the whole family."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected.tolist()


def bootstrap(statistic: Callable, documents: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over documents of `statistic(their indices)`, with the percentiles of
    `tail`; NaN for fewer than `FEWEST`.
    """
    if documents < FEWEST:
        return np.nan, np.nan
    of_drawn = lambda drawn: statistic(drawn.astype(int))
    found = stats.bootstrap(
        (np.arange(documents),),
        of_drawn,
        n_resamples=2000,
        confidence_level=1 - 2 * tail(documents),
        vectorized=False,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return tuple(map(float, found.confidence_interval))


def tail(documents: int) -> float:
    """Return the share of a bootstrap's draws beyond each end of a 95 % interval: 0.025 for many documents, less for
    few.

    Draws spread less than the mean of n independent documents by sqrt((n - 1) / n), and lack the tails of Student's t.
    Percentiles expanded for both (Hesterberg 2015, section 4.4) give Student's interval where the draws are normal.
    """
    z = np.sqrt(documents / (documents - 1)) * stats.t.ppf(0.975, documents - 1)
    return float(stats.norm.sf(z))


def over_documents(nats_SD, bytes_D) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over documents, in bits per byte, of the mean over seeds.

    The nats are by seed and document.
    """
    bits_D, bytes_D = np.mean(nats_SD, axis=0) / np.log(2), np.asarray(bytes_D, float)
    return bootstrap(lambda drawn: bits_D[drawn].sum() / bytes_D[drawn].sum(), len(bytes_D))


def wider(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the wider of two intervals (low, high), such as over seeds and over documents; NaN: no interval."""
    known = [(low, high) for low, high in (a, b) if not np.isnan(high - low)]
    return tuple(max(known, key=lambda x: x[1] - x[0])) if known else (np.nan, np.nan)


def told(mean: float, low: float | None, high: float | None, digits: int = 3) -> str:
    """Format a difference and its interval: "+0.041 [+0.030, +0.052]"; without an interval that is None or NaN."""
    interval = "" if low is None or np.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:+.{digits}f}{interval}"


def millions(tokens: float, digits: int = 3) -> str:
    """Format a number of tokens: "8.39 M"."""
    return f"{float(tokens) / 1e6:.{digits}g} M"


def told_row(row: dict) -> str:
    """Format the difference of a row of `study.compared` or `study.paired`, as `told`."""
    return told(row["difference"], row["low"], row["high"])


def at_most(x: float) -> str:
    """Format an upper bound of one digit, rounded up: "2e-09" for 1.4e-9."""
    unit = 10.0 ** math.floor(math.log10(x)) if x else 1.0
    return f"{math.ceil(round(x / unit, 9)) * unit:.0e}"


def verdict(low: float | None, high: float | None, sign: int, paper: float | None = None) -> str:
    """Return the verdict on a difference whose interval is (low, high); None or NaN means no interval.

    Args:
        sign: sign of the paper's difference, +1 or -1.
        paper: its size, if the paper prints one that a run of this kind could reproduce.
    """
    if low is None or np.isnan(low) or low <= 0 <= high:
        return "not resolved"
    if low * sign < 0:
        return "contradicted"
    return "reproduced" if paper is not None and low <= paper <= high else "same sign"
