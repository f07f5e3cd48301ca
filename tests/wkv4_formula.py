"""Eq. 16 of arXiv:2305.13048 in NumPy float64, every weight written out: the judge of all forms of `ops.wkv4`.

A channel is a softmax average: token t gives source i the log weight (t-1-i) w + k_i, itself u + k_t, and the
incoming past, whose mean is `mean` and whose log weight is `log_weight`, t w + log_weight.

Each result comes with its magnitude, the same sum with absolute values in place of the terms: where terms cancel,
a relative error in each of them is an error relative to the magnitude and not to the result.
"""

from typing import NamedTuple

import numpy as np


class Past(NamedTuple):
    mean: np.ndarray  # a / b
    log_weight: np.ndarray  # log b


class Sized(NamedTuple):
    value: np.ndarray
    magnitude: np.ndarray


def past_of(state) -> Past:
    """(num, den, log_scale) as a `Past`; an empty one has log weight -inf."""
    num, den, log_scale = (np.asarray(x, np.float64) for x in state)
    with np.errstate(divide="ignore"):
        return Past(num / np.where(den == 0, 1, den), np.log(den) + log_scale)


def _times(age, w):
    return np.where(age == 0, 0.0, age * w) if np.isfinite(w) else np.where(age == 0, 0.0, -np.inf)


def _softmax(log_weights):
    weights = np.exp(log_weights - log_weights.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _channel(w, u, k_T, v_T, mean, log_weight, dy_T):
    """Outputs, the past after the last token and the gradients of sum(dy * y) for one channel of one row."""
    T = len(k_T)
    t, source = np.arange(T)[:, None], np.arange(-1, T)[None]  # source -1 is the incoming past
    age = np.where(source < 0, t, np.where(source < t, t - 1 - source, 0)).astype(float)
    log_k = np.concatenate([[log_weight], k_T])[None]
    own = source == t
    log_weights = np.where(source > t, -np.inf, _times(age, w) + log_k + u * own)
    values = np.concatenate([[mean], v_T])
    p = _softmax(log_weights)
    y, y_size = p @ values, p @ abs(values)

    dlog = p * dy_T[:, None] * (values[None] - y[:, None])
    size = p * abs(dy_T)[:, None] * (abs(values)[None] + y_size[:, None])
    dvalues, dvalues_size = p.T @ dy_T, p.T @ abs(dy_T)
    both = lambda f: (f(dlog), f(size))

    last_age = np.concatenate([[T], np.arange(T)[::-1]]).astype(float)
    last = _times(last_age, w) + log_k[0]
    top = last.max()
    final = _softmax(last) @ values, top + np.log(np.exp(last - top).sum())
    final_size = _softmax(last) @ abs(values), 1.0
    return {
        "y": (y, y_size),
        "mean": (final[0], final_size[0]),
        "log_weight": (final[1], final_size[1]),
        "w": both(lambda x: (x * age).sum()),
        "u": both(lambda x: x[own].sum()),
        "k": both(lambda x: x[:, 1:].sum(0)),
        "v": (dvalues[1:], dvalues_size[1:]),
        "past_mean": (dvalues[0], dvalues_size[0]),
        "past_log_weight": both(lambda x: x[:, 0].sum()),
    }


def formula(w_D, u_D, k_BTD, v_BTD, past: Past, dy_BTD) -> dict[str, Sized]:
    """Outputs `y`, the past after the last token (`mean`, `log_weight`), and the gradients of sum(dy * y) with respect
    to `w`, `u` [B, D], `k`, `v` [B, T, D] and the incoming past, `past_mean` and `past_log_weight` [B, D]."""
    B, _, D = k_BTD.shape
    w, u, k, v, mean, log_weight, dy = (np.asarray(x, np.float64) for x in (w_D, u_D, k_BTD, v_BTD, *past, dy_BTD))
    rows = [
        [_channel(w[d], u[d], k[b, :, d], v[b, :, d], mean[b, d], log_weight[b, d], dy[b, :, d]) for d in range(D)]
        for b in range(B)
    ]
    stack = lambda name, which: np.stack(
        [np.stack([channel[name][which] for channel in row], axis=-1) for row in rows]
    )
    return {name: Sized(stack(name, 0), stack(name, 1)) for name in rows[0][0]}


def documents(reset_T, valid_T):
    """(positions of the tokens, whether the incoming past is theirs) of each document of a row."""
    tokens_N = np.flatnonzero(valid_T)
    first_N = np.flatnonzero(np.r_[True, reset_T[tokens_N][1:]])
    return [(tokens, not reset_T[tokens[0]]) for tokens in np.split(tokens_N, first_N[1:]) if len(tokens)]


def packed(w_D, u_D, k_BTD, v_BTD, past: Past, dy_BTD, reset_BT, valid_BT) -> dict[str, Sized]:
    """`formula`, each document by itself; padding has results and gradients of 0."""
    B, T, D = k_BTD.shape
    by_token, by_row = ("y", "k", "v"), ("w", "u", "past_mean", "past_log_weight")
    found = {name: np.zeros((2, B, T, D)) for name in by_token} | {name: np.zeros((2, B, D)) for name in by_row}
    found["mean"] = np.stack([past.mean, abs(past.mean)])
    found["log_weight"] = np.stack([past.log_weight, np.ones((B, D))])
    for b in range(B):
        for tokens, continues in documents(reset_BT[b], valid_BT[b]):
            row = [x[b : b + 1] for x in past] if continues else [np.zeros((1, D)), np.full((1, D), -np.inf)]
            k, v, dy = (x[b : b + 1, tokens] for x in (k_BTD, v_BTD, dy_BTD))
            part = formula(w_D, u_D, k, v, Past(*row), dy)
            for name in by_token:
                found[name][:, b, tokens] = np.stack(part[name])[:, 0]
            for name in by_row:
                # what a document makes of no past is not a gradient of the incoming one
                if continues or not name.startswith("past"):
                    found[name][:, b] += np.stack(part[name])[:, 0]
            for name in ("mean", "log_weight"):
                found[name][:, b] = np.stack(part[name])[:, 0]
    return {name: Sized(*x) for name, x in found.items()}
