"""Eq. 16 of arXiv:2305.13048 in NumPy float64, every weight written out: the reference for all forms of `ops.wkv4`.

A channel is a softmax average: token t gives source i the log weight n w + k_i, with n the number of tokens between
them, itself u + k_t, and the incoming past, whose mean is `mean` and whose log weight is `log_weight`,
n w + log_weight. Padding is no token. A token sees its own document only, the first of a row also the past.

Each result is an `operators.Sized`.
"""

from typing import NamedTuple

import numpy as np
from operators import Sized


class Past(NamedTuple):
    mean: np.ndarray  # a / b
    log_weight: np.ndarray  # log b


def past_of(state) -> Past:
    """(num, den, log_scale) as a `Past`; an empty one has log weight -inf."""
    num, den, log_scale = (np.asarray(x, np.float64) for x in state)
    with np.errstate(divide="ignore"):
        return Past(num / np.where(den == 0, 1, den), np.log(den) + log_scale)


def formula(w_D, u_D, k_BTD, v_BTD, past: Past, dy_BTD, reset_BT=None, valid_BT=None) -> dict[str, Sized]:
    """Outputs `y`, the past after the last token (`mean`, `log_weight`), and the gradients of sum(dy * y) with respect
    to `w`, `u` [B, D], `k`, `v` [B, T, D] and the incoming past, `past_mean` and `past_log_weight` [B, D].

    Padding (`valid_BT` False) has results and gradients of 0; a reset there is ignored.
    """
    B, T, _ = k_BTD.shape
    valid_BT = np.ones((B, T), bool) if valid_BT is None else valid_BT
    reset_BT = np.zeros((B, T), bool) if reset_BT is None else reset_BT & valid_BT
    w, u, k, v, mean, log_weight, dy = (np.asarray(x, np.float64) for x in (w_D, u_D, k_BTD, v_BTD, *past, dy_BTD))
    rows = [
        _row(w[:, None, None], u[:, None, None], k[b].T, v[b].T, mean[b], log_weight[b], dy[b].T, *masks)
        for b, masks in enumerate(zip(reset_BT, valid_BT, strict=True))
    ]
    return {name: Sized(*(np.stack(x) for x in zip(*(row[name] for row in rows), strict=True))) for name in rows[0]}


def _row(w, u, k_DT, v_DT, mean_D, log_weight_D, dy_DT, reset_T, valid_T):
    """(value, magnitude) of each result of one row. Source 0 is the incoming past, source 1 + i is token i."""
    T = k_DT.shape[1]
    log_k_D1S = np.concatenate([log_weight_D[:, None], k_DT], axis=1)[:, None]
    values_DS = np.concatenate([mean_D[:, None], v_DT], axis=1)
    sizes_DS = abs(values_DS)
    document_T, count_T = np.cumsum(reset_T), np.cumsum(valid_T)
    document_S, count_S, valid_S = np.r_[0, document_T], np.r_[0, count_T], np.r_[True, valid_T]
    t, source = np.arange(T)[:, None], np.arange(-1, T)[None]

    own = source == t
    age = np.where(own, 0, (count_T - valid_T)[:, None] - count_S).astype(float)
    seen = valid_T[:, None] & valid_S & (source <= t) & (document_T[:, None] == document_S)
    p = _softmax(_faded(age, w, seen) + log_k_D1S + u * own)[0]
    y, y_size = np.einsum("dts,ds->dt", p, values_DS), np.einsum("dts,ds->dt", p, sizes_DS)

    dlog = p * dy_DT[..., None] * (values_DS[:, None] - y[..., None])
    size = p * abs(dy_DT)[..., None] * (sizes_DS[:, None] + y_size[..., None])
    dvalues, dvalues_size = np.einsum("dts,dt->ds", p, dy_DT), np.einsum("dts,dt->ds", p, abs(dy_DT))
    both = lambda f: (f(dlog), f(size))

    age_after = (count_S[-1:] - count_S)[None].astype(float)
    last, log_weight = _softmax(_faded(age_after, w, (valid_S & (document_S == document_S[-1]))[None]) + log_k_D1S)
    return {
        "y": (y.T, y_size.T),
        "mean": ((last[:, 0] * values_DS).sum(-1), (last[:, 0] * sizes_DS).sum(-1)),
        "log_weight": (log_weight[:, 0], np.ones_like(mean_D)),
        "w": both(lambda x: (x * age).sum((1, 2))),
        "u": both(lambda x: (x * own).sum((1, 2))),
        "k": both(lambda x: x[:, :, 1:].sum(1).T),
        "v": (dvalues[:, 1:].T, dvalues_size[:, 1:].T),
        "past_mean": (dvalues[:, 0], dvalues_size[:, 0]),
        "past_log_weight": both(lambda x: x[:, :, 0].sum(1)),
    }


def _faded(age, w, seen):
    """Log of what is left after `age` steps of the decay `w`, -inf where a source is not seen."""
    with np.errstate(invalid="ignore"):  # 0 times -inf
        return np.where(seen, np.where(age == 0, 0.0, age * w), -np.inf)


def _softmax(log_weights):
    """(weights, log of their sum) over the last axis: zeros and -inf where nothing is seen."""
    top = log_weights.max(-1, keepdims=True)
    weights = np.exp(log_weights - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights / np.where(total == 0, 1, total), (top + np.log(total))[..., 0]
