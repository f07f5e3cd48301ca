"""WKV of RWKV-4 (arXiv:2305.13048, Eq. 16) in NumPy float64, token by token, at any T: the exact reference.

A channel's past is a mean m of values with a log weight l. Nothing overflows, and the judge shares nothing with the
forms under test, which carry sums and a scale. A token has a share s in what it reads, and p in what it leaves:

    s = sigmoid(u + k - l)            y = m + s (v - m)
    p = sigmoid(k - (l + w))          m <- m + p (v - m),   l <- log(exp(l + w) + exp(k))

With p_ti the weight of token i in y_t and a_ti its age t - 1 - i there, the gradients of sum(dy * y) are

    dL/dv_i = sum_t p_ti dy_t         dL/dk_i = v_i dL/dv_i - sum_t p_ti dy_t y_t
    dL/du   = sum_t s_t dy_t (v_t - y_t)
    dL/dw   = sum_t dy_t (sum_{i<t} p_ti a_ti v_i - y_t sum_{i<t} p_ti a_ti)

Every sum over p is a recurrence of the same kind: means of the past in the forward direction, totals of the future in
the backward one. Each result comes with its magnitude, the same sum with absolute values in place of the terms.
"""

import numpy as np


def exact(w_C, u_C, k_TC, v_TC, dy_TC):
    """Return {"y", "w", "u", "k", "v": (value, magnitude)} of every channel from an empty past; w must be finite."""
    w, u, k, v, dy = (np.asarray(x, np.float64) for x in (w_C, u_C, k_TC, v_TC, dy_TC))
    k = k - k.max(0)  # a common factor of all weights changes nothing
    weight_TC = _log_weights(w, k)  # l before each token
    p, left = _sigmoids(k - (weight_TC + w))
    s, past = _sigmoids(u + k - weight_TC)
    (m, m_size), (age, age_v, age_size) = _means(p, left, v)
    y, y_size = past * m + s * v, past * m_size + s * abs(v)
    total, total_y, size, size_y = _totals(p, left, s, past, (dy, dy * y, abs(dy), abs(dy) * y_size))
    over_time = lambda value, magnitude: (value.sum(0), magnitude.sum(0))
    return {
        "y": (y, y_size),
        "w": over_time(past * dy * (age_v - y * age), past * abs(dy) * (age_size + y_size * age)),
        "u": over_time(s * dy * (v - y), s * abs(dy) * (abs(v) + y_size)),
        "k": (v * total - total_y, abs(v) * size + size_y),
        "v": (total, size),
    }


def _sigmoids(x):
    """Return sigmoid(x) and 1 - sigmoid(x), each to full relative precision."""
    return np.exp(-np.logaddexp(0, -x)), np.exp(-np.logaddexp(0, x))


def _log_weights(w_C, k_TC):
    out = np.empty_like(k_TC)
    weight = np.full_like(w_C, -np.inf)
    for t, k in enumerate(k_TC):
        out[t] = weight
        weight = np.logaddexp(weight + w_C, k)
    return out


def _means(p_TC, left_TC, v_TC):
    """Return, before each token, the past's means of v and |v| [2, T, C], and of age, age·v and age·|v| [3, T, C]."""
    values_T2C = np.stack([v_TC, abs(v_TC)], axis=1)
    means, ages = np.zeros(values_T2C.shape), np.zeros((len(v_TC), 3, v_TC.shape[1]))
    mean, age = means[0].copy(), ages[0].copy()
    for t, (p, left, values) in enumerate(zip(p_TC, left_TC, values_T2C, strict=True)):
        means[t], ages[t] = mean, age
        age[0] += 1
        age[1:] += mean
        age *= left
        mean = left * mean + p * values
    return means.swapaxes(0, 1), ages.swapaxes(0, 1)


def _totals(p_TC, left_TC, s_TC, past_TC, terms):
    """Return sum_t p_ti x_t for each source i and each x of `terms`."""
    x_TNC = np.stack(terms, axis=1)
    later_TNC = past_TC[:, None] * x_TNC
    out, future = np.empty_like(x_TNC), np.zeros(x_TNC.shape[1:])
    for t in reversed(range(len(x_TNC))):
        out[t] = future
        future = left_TC[t] * future + later_TNC[t]
    return (p_TC[:, None] * out + s_TC[:, None] * x_TNC).swapaxes(0, 1)
