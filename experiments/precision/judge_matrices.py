"""`ops.wkv6` and `ops.wkv7` in NumPy float64, token by token, at any T: the exact reference, with all gradients.

In both, a token maps the state of a head by a matrix A_t, and the backward pass maps dS = dL/dS by its transpose:

    S_t = A_t S_{t-1} + k_t v_t^T                 dS_{t-1} = A_t^T dS_t + what y_t reads

    wkv6   A = diag(exp(w))                       y_t = S_{t-1}^T r_t + (r_t . u k_t) v_t
    wkv7   A = diag(exp(w)) + b a^T               y_t = S_t^T r_t

Only these two lines are loops. The rest is computed for a span of tokens at once from its states, which the backward
pass recomputes from those kept between spans. Heads are the last axis, along which NumPy is fast.

Each result comes with its magnitude. A result of wkv6 is a sum of products, and its magnitude is the same sum with
absolute values in place of the terms, as for WKV-4 (`judge`). In wkv7 absolute values would grow without limit, since
a token would add its removal to what it removes from. There the magnitude is |X|^T |x| where a result is X^T x, such
as |S_t|^T |r_t| for y_t, and of that the largest in a head over time, because a token mixes the channels of a head and
passes an error on to all later tokens.
"""

import numpy as np

SPAN = 200  # tokens whose states are all in memory


def exact5(r_TKH, w_KH, *others):
    """Return the results of `exact6` for one decay shared by all tokens, with its gradient summed over them."""
    found = exact6(r_TKH, np.broadcast_to(w_KH, r_TKH.shape), *others)
    return found | {"w": tuple(x.sum(0) for x in found["w"])}


def exact6(r_TKH, w_TKH, k_TKH, v_TVH, u_KH, state_KVH, dy_TVH, dstate_KVH):
    """Return {name: (value, magnitude)} of "y", the "final" state, and the gradients of sum(dy y) + sum(dstate final).

    Gradients have the names of the operands: that of w is for each token, that of u is summed over all.
    """
    r, w, k, v, u, state, dy, dstate = _float64(r_TKH, w_TKH, k_TKH, v_TVH, u_KH, state_KVH, dy_TVH, dstate_KVH)
    u = np.broadcast_to(u, r.shape)
    values = _over_time(_span6, (r, w, k, v, u, dy), state, dstate)
    sizes = _over_time(_span6, (abs(r), w, abs(k), abs(v), abs(u), abs(dy)), abs(state), abs(dstate))
    both = {name: (value, sizes[name]) for name, value in values.items()}
    return both | {"u": tuple(x.sum(0) for x in both["u"])}


def exact7(r_TKH, w_TKH, k_TKH, v_TVH, a_TKH, b_TKH, state_KVH, dy_TVH, dstate_KVH):
    """Return the results of wkv7, as `exact6` does those of wkv6."""
    *operands, state, dy, dstate = _float64(
        r_TKH, w_TKH, k_TKH, v_TVH, a_TKH, b_TKH, state_KVH, dy_TVH, dstate_KVH
    )  # fmt: skip
    found = _over_time(_span7, (*operands, dy), state, dstate)
    largest = {name: found.pop(f"|{name}|").max((0, 1)) for name in (*"yrwkvab", "final", "state")}  # of a head
    return {name: (value, np.broadcast_to(largest[name], value.shape)) for name, value in found.items()}


def _float64(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def _over_time(span_of, operands, state, dstate):
    """Return all results by name.

    `span_of` maps the operands of a span of tokens to (A as a function, the tokens' additions to S, their additions to
    dS, results as a function of S before the first token and after each, and of dS likewise).
    """
    spans = [slice(i, i + SPAN) for i in range(0, len(operands[0]), SPAN)]
    states = [state]
    for span in spans:
        A, writes, _, _ = span_of(*(x[span] for x in operands))
        states.append(_repeat(A, states[-1], writes)[-1])
    found, final = [], states.pop()
    for span in reversed(spans):
        A, writes, reads, results = span_of(*(x[span] for x in operands))
        dstates = _repeat(A, dstate, reads, backward=True)
        found.append(results(_repeat(A, states.pop(), writes), dstates))
        dstate = dstates[0]
    tokens = {name: np.concatenate([x[name] for x in reversed(found)]) for name in found[0]}
    return tokens | {"final": final, "state": dstate}


def _repeat(A, x_KVH, added_TKVH, backward=False):
    """Return [T + 1, K, V, H]: x <- A_t x + added_t over time, or its transpose from last to first if `backward`."""
    out = np.empty((len(added_TKVH) + 1, *x_KVH.shape))
    out[-1 if backward else 0] = x_KVH
    for t in reversed(range(len(added_TKVH))) if backward else range(len(added_TKVH)):
        before, after = (t + 1, t) if backward else (t, t + 1)
        np.add(A(t, out[before], backward), added_TKVH[t], out=out[after])
    return out


def _span6(r, w, k, v, u, dy):
    decay = np.exp(w)

    def results(states, dstates):
        past, ds = states[:-1], dstates[1:]
        vdy, ruk = (v * dy).sum(1, keepdims=True), (r * u * k).sum(1, keepdims=True)
        return {
            "y": _by_key(past, r) + ruk * v,
            "r": _by_value(past, dy) + u * k * vdy,
            "w": decay * np.einsum("tkvh,tkvh->tkh", ds, past),
            "k": _by_value(ds, v) + u * r * vdy,
            "v": _by_key(ds, k) + ruk * dy,
            "u": r * k * vdy,
        }

    return lambda t, x, _: decay[t][:, None] * x, _outer(k, v), _outer(r, dy), results


def _span7(r, w, k, v, a, b, dy):
    decay = np.exp(w)

    def A(t, x, transposed):
        left, right = (a[t], b[t]) if transposed else (b[t], a[t])
        return decay[t][:, None] * x + left[:, None] * (right[:, None] * x).sum(0)

    def results(states, dstates):
        operands = states[:-1], states[1:], dstates[1:] + _outer(r, dy), decay, r, k, v, a, b, dy
        sizes = _products7(*map(np.abs, operands))
        sizes |= {"final": abs(states).max(2), "state": abs(dstates).max(2)}
        return _products7(*operands) | {f"|{name}|": size for name, size in sizes.items()}

    transposed_reads = decay * r + a * (b * r).sum(1, keepdims=True)
    return A, _outer(k, v), _outer(transposed_reads, dy), results


def _products7(past, now, ds, decay, r, k, v, a, b, dy):
    return {
        "y": _by_key(now, r),
        "r": _by_value(now, dy),
        "w": decay * np.einsum("tkvh,tkvh->tkh", ds, past),
        "k": _by_value(ds, v),
        "v": _by_key(ds, k),
        "a": _by_value(past, _by_key(ds, b)),
        "b": _by_value(ds, _by_key(past, a)),
    }


def _outer(x_TKH, y_TVH):
    return x_TKH[:, :, None] * y_TVH[:, None]


def _by_key(x_TKVH, y_TKH):
    return np.einsum("tkvh,tkh->tvh", x_TKVH, y_TKH)


def _by_value(x_TKVH, y_TVH):
    return np.einsum("tkvh,tvh->tkh", x_TKVH, y_TVH)
