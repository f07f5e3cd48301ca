"""Intervals of paired differences, and what many comparisons do to them."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from rwkv_jax import evaluate


def t_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences, one a seed, and its Student t interval; of one seed, the interval is NaN."""
    x = np.asarray(differences, float)
    if len(x) < 2:
        return float(x.mean()), np.nan, np.nan
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of a mean of 0 under Student's t; NaN of one seed, 0 of equal differences that are not 0."""
    x = np.asarray(differences, float)
    if len(x) < 2:
        return np.nan
    if np.ptp(x) == 0:
        return float(x[0] == 0)
    return float(stats.ttest_1samp(x, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): below 0.05 here, below 0.05 for the family as a whole."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected.tolist()


def wider(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The wider of two intervals (low, high), NaN being none: over seeds and over documents, say."""
    known = [(low, high) for low, high in (a, b) if not np.isnan(high - low)]
    return tuple(max(known, key=lambda x: x[1] - x[0])) if known else (np.nan, np.nan)


def paired_bits(a_SD, b_SD, bytes_D, seed: int = 0, samples: int = 2000) -> tuple[float, float, float]:
    """Bits per byte of nats `a` minus those of `b`, by seed and document, and a 95 % interval.

    The wider of Student's t over seeds and the percentile bootstrap over documents of the mean over seeds: neither
    another start nor another text may turn the sign.
    """
    nats_SD, bytes_D = np.asarray(a_SD, float) - np.asarray(b_SD, float), np.asarray(bytes_D, float)
    mean, *over_seeds = t_interval(nats_SD.sum(1) / np.log(2) / bytes_D.sum())
    return mean, *wider(over_seeds, evaluate.interval_over_documents(nats_SD.mean(0), bytes_D, seed, samples))
