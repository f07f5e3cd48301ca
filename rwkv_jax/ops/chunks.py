"""Matrix-valued recurrences over chunks of tokens: what `wkv6` and `wkv7` share.

A rule computes one chunk of C tokens from the state before it, and the cotangents of one chunk from those after it.
`recur` runs a rule over any length, forward and backward, and keeps one state a chunk for the backward pass: memory
is linear in T, and K V / C numbers a token and head beside the inputs.

Chunks of more than one token are products of matrices, whose entries are scores decayed between two tokens,

    scores[t, i] = sum_K x_t y_i exp(sum_{i<j<t} w_j)        for i < t, else 0.

The exponent has to be split between the factors of a product, and exp(-sum w) overflows as soon as the decays of a
chunk multiply to less than 1e-38. `decayed_scores` therefore halves: scores between the later and the earlier half of
a block factor at the border between them, where both exponents are sums of log decays, and so at most 0; each half is
treated likewise. No exponent is a difference, so nothing overflows or cancels, whatever the decays. At 16 tokens this
takes as long as factors that are centred in the chunk, which overflow, and is up to twice as exact (2-core CPU, K 64).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# float32 products are float32 on accelerators too: one bfloat16 pass is 3e-3 off, and SA of `wkv7` feeds on itself.
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Rule(NamedTuple):
    """How one chunk is computed; operands are [B, H, C, .] in the dtype of the accumulators.

    forward:   (state_BHKV, operands, reset_BC or None) -> (state_BHKV, y_BHCV)
    backward:  (state_BHKV, operands, reset_BC or None, dstate_BHKV, dy_BHCV) -> (dstate_BHKV, cotangents of operands)
    chunk:     C, a power of 2
    """

    forward: Callable
    backward: Callable
    chunk: int


def by_chunk(forward: Callable, chunk: int) -> Rule:
    """The rule of a forward pass, whose backward pass computes each chunk again and differentiates it."""

    def backward(state, operands, reset_BC, dstate, dy_BHCV):
        _, vjp = jax.vjp(lambda state, operands: forward(state, operands, reset_BC), state, operands)
        return vjp((dstate, dy_BHCV))

    return Rule(forward, backward, chunk)


def by_token(step: Callable, step_grads: Callable, chunk: int) -> Rule:
    """The rule of a recurrence as it is written, one token after the other; its backward pass recomputes the states.

    step:        (state_BHKV before a token, its operands [B, H, .]) -> (state after it, y_BHV)
    step_grads:  (state_BHKV before a token, its operands, dstate after it, dy_BHV) -> (dstate before it, cotangents)
    """

    def tokens(operands, reset_BC):
        reset_CB111 = None if reset_BC is None else reset_BC.T[..., None, None, None]
        return tuple(jnp.moveaxis(x, 2, 0) for x in operands), reset_CB111

    def start(state, reset):
        return state if reset is None else jnp.where(reset, 0, state)

    def forward(state, operands, reset_BC):
        one = lambda state, x: step(start(state, x[1]), x[0])
        state, y_CBHV = lax.scan(one, state, tokens(operands, reset_BC), unroll=operands[0].shape[2] == 1)
        return state, jnp.moveaxis(y_CBHV, 0, 2)

    def backward(state, operands, reset_BC, dstate, dy_BHCV):
        tokens_C, reset_C = tokens(operands, reset_BC)

        def recompute(state, x):
            state = start(state, x[1])
            return step(state, x[0])[0], state

        def one(dstate, x):
            token, reset, state, dy_BHV = x
            dstate, found = step_grads(state, token, dstate, dy_BHV)
            return start(dstate, reset), found

        unroll = operands[0].shape[2] == 1
        _, states_CBHKV = lax.scan(recompute, state, (tokens_C, reset_C), unroll=unroll)
        each = (tokens_C, reset_C, states_CBHKV, jnp.moveaxis(dy_BHCV, 2, 0))
        dstate, found = lax.scan(one, dstate, each, reverse=True, unroll=unroll)
        return dstate, tuple(jnp.moveaxis(x, 0, 2) for x in found)

    return Rule(forward, backward, chunk)


# Compiled once for its shapes where it is called outside of `jax.jit`, and traced once for all layers where inside.
@partial(jax.jit, static_argnums=0)
def recur(rule: Rule, operands: tuple, state_BHKV, reset_BT=None, valid_BT=None):
    """(y_BTHV, state after the last token) of a rule over T tokens.

    Args:
        operands: arrays [B, T, H, .], or [H, .] for what is the same in every token. At least the first is of the
            former kind. All are zero in tokens that are not valid, which have to leave the state untouched then.
        state_BHKV: before the first token; its dtype is that of the accumulators.
        reset_BT, valid_BT: as in `wkv6`.
    """
    if reset_BT is not None and valid_BT is not None:
        reset_BT = reset_BT & valid_BT
    return _recur(rule, operands, state_BHKV, reset_BT, valid_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(rule, operands, state, reset_BT, valid_BT):
    return _forward(rule, operands, state, reset_BT, valid_BT)[0]


def _forward(rule, operands, state, reset_BT, valid_BT):
    T, dtype = operands[0].shape[1], state.dtype
    chunk, starts, padded, reset_BP, valid_BP = _whole_chunks(rule, operands, reset_BT, valid_BT)

    def one_chunk(state, start):
        tokens, reset_BC = _read(padded, reset_BP, valid_BP, start, chunk, dtype)
        new, y_BHCV = rule.forward(state, tokens, reset_BC)
        return new, (y_BHCV.swapaxes(1, 2), state)

    final, (y_MBCHV, starts_MBHKV) = lax.scan(one_chunk, state, starts, unroll=len(starts) == 1)
    y_BTHV, starts_MBHKV = checkpoint_name((_joined(y_MBCHV, T), starts_MBHKV), "mixed")
    return (y_BTHV, final), (operands, starts_MBHKV, reset_BT, valid_BT)


def _backward(rule, saved, cotangents):
    operands, starts_MBHKV, reset_BT, valid_BT = saved
    dy_BTHV, dstate = cotangents
    T, dtype = operands[0].shape[1], dstate.dtype
    chunk, starts, padded, reset_BP, valid_BP = _whole_chunks(rule, (*operands, dy_BTHV), reset_BT, valid_BT)
    constant = [x.ndim == 2 for x in operands]

    def one_chunk(carry, start_and_state):
        dstate, sums = carry
        start, state = start_and_state
        (*tokens, dy_BHCV), reset_BC = _read(padded, reset_BP, valid_BP, start, chunk, dtype)
        dstate, found = rule.backward(state, tuple(tokens), reset_BC, dstate, dy_BHCV)
        valid_BC = None if valid_BP is None else lax.dynamic_slice_in_dim(valid_BP, start, chunk, 1)
        found = [x if valid_BC is None else jnp.where(valid_BC[:, None, :, None], x, 0) for x in found]
        of_all = [x for x, c in zip(found, constant, strict=True) if c]
        sums = [total + x.sum((0, 2)) for total, x in zip(sums, of_all, strict=True)]
        return (dstate, sums), [x.swapaxes(1, 2) for x, c in zip(found, constant, strict=True) if not c]

    sums = [jnp.zeros(x.shape, dtype) for x in operands if x.ndim == 2]
    carry, each = lax.scan(one_chunk, (dstate, sums), (starts, starts_MBHKV), reverse=True, unroll=len(starts) == 1)
    dstate, sums = carry
    sums, each = iter(sums), iter(each)
    found = (next(sums) if c else _joined(next(each), T) for c in constant)
    return tuple(d.astype(x.dtype) for d, x in zip(found, operands, strict=True)), dstate, None, None


_recur.defvjp(_forward, _backward)


def _whole_chunks(rule, operands, reset_BT, valid_BT):
    """(tokens a chunk, first token of each, the arrays with T rounded up to whole chunks, added tokens invalid)."""
    B, T = operands[0].shape[:2]
    chunk = min(rule.chunk, 1 << (T - 1).bit_length())
    extra = -T % chunk
    if extra:
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        pad = lambda x: jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)))
        operands = tuple(x if x.ndim == 2 else pad(x) for x in operands)
        reset_BT, valid_BT = (None if x is None else pad(x) for x in (reset_BT, valid_BT))
    return chunk, jnp.arange(0, T + extra, chunk), operands, reset_BT, valid_BT


def _read(operands, reset_BT, valid_BT, start, chunk, dtype):
    """Operands [B, H, C, .] and resets of one chunk. Slices are transposed here, in the cache, and not as a whole."""
    part = lambda x: None if x is None else lax.dynamic_slice_in_dim(x, start, chunk, 1)
    valid_BC = part(valid_BT)

    def read(x):
        x = x[None, :, None] if x.ndim == 2 else part(x).swapaxes(1, 2)
        x = jnp.broadcast_to(x.astype(dtype), (len(operands[0]), *x.shape[1:2], chunk, x.shape[-1]))
        return x if valid_BC is None else jnp.where(valid_BC[:, None, :, None], x, 0)

    return tuple(map(read, operands)), part(reset_BT)


def _joined(x_MBCHV, T):
    """[B, T, H, V] of chunks."""
    M, B, C, H, V = x_MBCHV.shape
    return x_MBCHV.swapaxes(0, 1).reshape(B, M * C, H, V)[:, :T]


class Decays(NamedTuple):
    """Log decays summed over parts of a chunk, all at most 0: before each token, after each token, over the whole."""

    before: jax.Array  # [..., C, K] sum_{j<t} w_j
    after: jax.Array  # [..., C, K] sum_{j>t} w_j
    whole: jax.Array  # [..., 1, K]


def decayed_scores(x_BHCPK, y_BHCQK, w_BHCK):
    """(scores_BHPQCC, Decays): scores[p, q, t, i] = sum_K x_tp y_iq exp(sum_{i<j<t} w_j) for i < t, else 0.

    P and Q are how many left and right factors each token has. See the head of this file for the method.
    """
    (B, H, C, P, K), Q = x_BHCPK.shape, y_BHCQK.shape[3]
    # n blocks of one row each, of c tokens: their number is halved in every round
    scores = jnp.zeros((B * H * C, 1, P, 1, Q), x_BHCPK.dtype)
    before = after = jnp.zeros((B * H * C, 1, K), w_BHCK.dtype)
    whole = w_BHCK.reshape(-1, 1, K)
    c = 1
    while c < C:
        halves = lambda x: (x.reshape(-1, 2, *x.shape[1:])[:, i] for i in (0, 1))
        first_before, later_before = halves(before)
        first_after, later_after = halves(after)
        first_whole, later_whole = halves(whole)
        first, later = halves(scores)
        y = y_BHCQK.reshape(-1, 2, c, Q, K)[:, 0] * jnp.exp(first_after)[:, :, None]
        x = x_BHCPK.reshape(-1, 2, c, P, K)[:, 1] * jnp.exp(later_before)[:, :, None]
        across = matmul(x.reshape(-1, c * P, K), y.reshape(-1, c * Q, K).swapaxes(1, 2)).reshape(first.shape)
        top = jnp.concatenate([first, jnp.zeros_like(across)], axis=3)
        scores = jnp.concatenate([top, jnp.concatenate([across, later], axis=3)], axis=1)
        before = jnp.concatenate([first_before, first_whole + later_before], axis=1)
        after = jnp.concatenate([first_after + later_whole, later_after], axis=1)
        whole = first_whole + later_whole
        c *= 2
    own = lambda x: x.reshape(B, H, *x.shape[1:])
    return own(scores).transpose(0, 1, 3, 5, 2, 4), Decays(*map(own, (before, after, whole)))


@jax.custom_vjp
def inverse(m_BHCC):
    """(I - M)^-1 of a strictly lower triangular M, C a power of 2: blocks twice as large in each round.

    No powers of M: with keys that repeat they reach 1e17 at C = 64, while the inverse's entries stay near 1. XLA's
    triangular solve takes 70 times as long on a CPU.
    """
    B, H, C, _ = m_BHCC.shape
    x = jnp.ones((B * H * C, 1, 1), m_BHCC.dtype)
    c = 1
    while c < C:
        blocks = m_BHCC.reshape(B * H, C // (2 * c), 2, c, C // (2 * c), 2, c)
        i = jnp.arange(C // (2 * c))
        across = blocks[:, i, 1, :, i, 0].swapaxes(0, 1).reshape(-1, c, c)  # from the earlier half to the later one
        first, later = x.reshape(-1, 2, c, c)[:, 0], x.reshape(-1, 2, c, c)[:, 1]
        low = jnp.concatenate([matmul(matmul(later, across), first), later], axis=2)
        x = jnp.concatenate([jnp.concatenate([first, jnp.zeros_like(first)], axis=2), low], axis=1)
        c *= 2
    return x.reshape(m_BHCC.shape)


def _inverse_forward(m):
    x = inverse(m)
    return x, x


def _inverse_backward(x, dx):
    """dM = X^T dX X^T."""
    return (matmul(matmul(x.mT, dx), x.mT),)


inverse.defvjp(_inverse_forward, _inverse_backward)


def documents(reset_BC):
    """Which tokens of a chunk see each other: (same_BCC, past_BC, last_BC).

    same[t, i]: both are of one document; past[t]: t's document has begun before the chunk; last[i]: i's document is
    the one at the end of the chunk.
    """
    number_BC = jnp.cumsum(reset_BC, axis=1)
    return number_BC[:, :, None] == number_BC[:, None], number_BC == 0, number_BC == number_BC[:, -1:]
