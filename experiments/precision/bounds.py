"""Bounds on the errors of every form of `ops.wkv4`, `wkv6` and `wkv7`, and their derivation."""

import numpy as np

# merges of a token, from its own position to the last result that depends on it
STEPS = {
    "scan": ("T", lambda T: T),
    "associative": ("2 log2(T + 1)", lambda T: 2 * np.log2(T + 1)),
    "pallas": ("T / 8 + 3", lambda T: T / 8 + 3),  # eight tokens in three rounds, then one carry
}
BOUND = "eps (2 steps + spread of log weights + 16), eps T more for the gradients of w and u"

TOKENS = {"scan": 1, "chunked": 16}  # tokens between two states of `wkv6` and `wkv7`
MATRIX_BOUND = "eps (2 steps + min(88, largest |w|) + 32), eps T / 16 more for gradients that are sums over tokens"
MATRIX_STEPS = {
    "scan": "min(T, 16 / |w|), w the mean log decay of a head's slowest channel",
    "chunked": "a 16th of that",
}


def bound(form, T, spread, summed=False):
    """Return the largest error of a float32 result relative to its magnitude (`judge`): eps (2 steps + spread + 16).

    A merge costs a weight about 2 eps: half for the product, half for the sum, 1 for the exponential. Exponents are
    differences, rounded relative to the `spread` of the log weights (largest minus smallest k, plus |u|), and sum to
    no more than that before a weight vanishes. 16 covers the few operations per result. The gradients of w and u
    (`summed`) are also plain float32 sums over time: T more. Roundings that all err in one direction could sum to a
    few times as much; the bound does not cover that case.
    """
    _, steps = STEPS[form]
    return np.finfo(np.float32).eps * (2 * steps(T) + spread + 16 + (T if summed else 0))


def matrix_bound(form, T, slowest, strongest, summed=False):
    """Return the counterpart of `bound` for `wkv6` and `wkv7`: eps (2 steps + min(88, strongest) + 32).

    It is relative to the magnitude in `judge_matrices`. From one state to the next a term loses about 2 eps: half in
    the product, half in the sum, 1 in the exponential. The scan rounds exp(w) alike in each step where the decay is
    constant, so its error grows with T, until the decay of the `slowest` channel (its mean |log decay|) has left
    e^-16, about eps, of a term. Keys 1,000 times as large as others are covered by that.

    In a chunk, exponents are sums of log decays and rounded relative to them. Every term of the gradient of a log
    decay has that decay in its exponent, the `strongest` being the worst; beyond 88 the term vanishes. 32 covers the
    exponents of other terms, which are forgotten at 16, and the few operations per result. Gradients that are sums
    over tokens (`summed`: of u, and of w in RWKV-5) are added up 16 or more at a time.

    For WKV-7 the bound assumes that tokens amplify an error no more than they amplify the state. Keys and rates can be
    chosen so that without decay some directions grow a thousandfold in 64 tokens. A state that is kept out of those
    directions has no such bound in any float32 form, since its errors are not kept out.
    """
    steps = 16 / np.maximum(slowest, 16 / T) / TOKENS[form]
    return np.finfo(np.float32).eps * (2 * steps + np.minimum(88, strongest) + 32 + (T / 16 if summed else 0))
