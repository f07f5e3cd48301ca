"""Distances between arrays."""

import jax
import numpy as np


def error_ratio(actual, expected) -> float:
    """rms(actual - expected) / rms(expected); the rms of the error where all of `expected` is zero."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{actual.shape} against {expected.shape}"
    if not np.isfinite(actual).all():
        return np.inf
    rms = lambda x: np.sqrt(np.mean(np.square(x))) if x.size else 0.0
    return rms(actual - expected) / (rms(expected) or 1.0)


def worst_ratio(actual, expected, axis=-1) -> float:
    """The largest `error_ratio` among the slices along `axis`: a single bad channel shows."""
    actual, expected = (np.moveaxis(np.asarray(x, np.float64), axis, 0) for x in (actual, expected))
    return max(error_ratio(a, b) for a, b in zip(actual, expected, strict=True))


def assert_same(actual, expected, limit=2e-6):
    """Check that every array of a tree is within an `error_ratio` of its counterpart: one computation in two
    programs."""
    jax.tree.map(lambda a, b: np.testing.assert_array_less(error_ratio(a, b), limit), actual, expected)
