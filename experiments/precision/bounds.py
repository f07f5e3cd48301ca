"""How far a form of `ops.wkv4`, `wkv6` and `wkv7` may be from its equations, and what the claim is made of."""

import numpy as np

# merges that a token goes through between its own place and the last result that it enters
STEPS = {
    "scan": ("T", lambda T: T),
    "associative": ("2 log2(T + 1)", lambda T: 2 * np.log2(T + 1)),
    "pallas": ("T / 8 + 3", lambda T: T / 8 + 3),  # eight tokens in three rounds, then one carry
}
BOUND = "eps (2 steps + spread of log weights + 16), eps T more for the gradients of w and u"

TOKENS = {"scan": 1, "chunked": 16}  # of `wkv6` and `wkv7`: between two states
MATRIX_BOUND = "eps (2 steps + min(88, largest |w|) + 32), eps T / 16 more for gradients that are sums over tokens"
MATRIX_STEPS = {
    "scan": "min(T, 16 / |w|), w the mean log decay of a head's slowest channel",
    "chunked": "a 16th of that",
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


def matrix_bound(form, T, slowest, strongest, summed=False):
    """As `bound`, of `wkv6` and `wkv7`: eps (2 steps + min(88, strongest) + 32), of the magnitude in `judge_matrices`.

    A state costs what it hands on about 2 eps: half for the product, half for the sum, 1 for the exponential, which is
    off by the same amount in every step where the decay is constant, so that errors add up until the decay of the
    `slowest` channel (its mean |log decay|) has made e^-16, about eps, of them. Within a chunk, exponents are sums of
    log decays: a term is rounded relative to them, and all terms of the gradient of a `strongest` log decay have that
    one; beyond 88 they vanish. 32 covers what is left of such sums, and the few operations per result. Gradients that
    are sums over tokens (`summed`: of u, and of w in RWKV-5) are added up in chunks of 16 or more.
    """
    steps = 16 / np.maximum(slowest, 16 / T) / TOKENS[form]
    return np.finfo(np.float32).eps * (2 * steps + np.minimum(88, strongest) + 32 + (T / 16 if summed else 0))
