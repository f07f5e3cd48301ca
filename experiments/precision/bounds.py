"""How far a form of `ops.wkv4` may be from Eq. 16, and what the claim is made of."""

import numpy as np

# merges that a token goes through between its own place and the last result that it enters
STEPS = {
    "scan": ("T", lambda T: T),
    "associative": ("2 log2(T + 1)", lambda T: 2 * np.log2(T + 1)),
    "pallas": ("T / 8 + 3", lambda T: T / 8 + 3),  # eight tokens in three rounds, then one carry
}


def bound(form, T, spread, summed=False):
    """Largest error of a float32 result relative to its magnitude (`judge`): eps (2 steps + spread + 16).

    A merge costs a weight about 2 eps: half for the product, half for the sum, 1 for the exponential. Exponents are
    differences, rounded relative to the `spread` of the log weights (largest minus smallest k, plus |u|), and add up
    to no more than that before a weight vanishes. 16 covers the few operations per result. The gradients of w and u
    (`summed`) are plain float32 sums over time besides: T more. Roundings that all err one way could add up to a few
    times as much; they are not seen to.
    """
    _, steps = STEPS[form]
    return np.finfo(np.float32).eps * (2 * steps(T) + spread + 16 + (T if summed else 0))
