"""Matrix-valued recurrences over chunks of tokens, shared by `wkv6` and `wkv7`.

A rule computes one chunk of C tokens from the state before it, and the cotangents of one chunk from those after it.
`recur` runs a rule over any length, forward and backward. For the backward pass it saves one state a chunk and the
rule's residuals: memory is linear in T. Beside the inputs that is K V / C numbers a token and head; the chunked forms
add C for `wkv6`, 5 C + V for `wkv7`.

Chunks of more than one token are products of matrices, whose entries are scores decayed between two tokens,

    scores[t, i] = sum_K x_t y_i exp(sum_{i<j<t} w_j)        for i < t, else 0.

The exponent has to be split between the factors of a product, and exp(-sum w) overflows as soon as the decays of a
chunk multiply to less than 1e-38. `factors` therefore works by halves: scores between the later and the earlier half
of a block are split at the border between them, where both exponents are sums of log decays, at most 0. Each half is
treated likewise. No exponent is a difference, so nothing overflows or cancels, whatever the decays.

Factors centred in the chunk would save a fifth of the time of a training pass, but overflow and are half as exact.
On a CPU the products of a chunk are small and reach an eighth of the peak; chunks of 32 take 1.3 times as long as
those of 16 (2 cores, B 4, T 1,024, 8 heads of 64).
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# float32 products are float32 on accelerators too: one bfloat16 pass is 3e-3 off, and errors of SA in `wkv7` add up.
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Rule(NamedTuple):
    """The computation of one chunk; operands are [B, H, C, .] in the dtype of the accumulators.

    forward:   (state_BHKV, operands, reset_BC or None) -> (state_BHKV, y_BHCV, residuals for backward: a tuple)
    backward:  (state_BHKV, operands, reset_BC or None, residuals, dstate_BHKV, dy_BHCV)
               -> (dstate_BHKV, cotangents of operands)
    chunk:     C, a power of 2
    """

    forward: Callable
    backward: Callable
    chunk: int


def by_token(step: Callable, step_grads: Callable, chunk: int) -> Rule:
    """The rule of a recurrence computed token by token; its backward pass recomputes the states.

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
        return state, jnp.moveaxis(y_CBHV, 0, 2), ()

    def backward(state, operands, reset_BC, _, dstate, dy_BHCV):
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


# Outside `jax.jit` it is compiled once for its shapes; inside, it is traced once for all layers.
@partial(jax.jit, static_argnums=(0, 1))
def recur(plain: Rule, trained: Rule, operands: tuple, state_BHKV, reset_BT=None, valid_BT=None):
    """(y_BTHV, state after the last token) over T tokens.

    Args:
        plain, trained: the rules without and with gradients.
        operands: arrays [B, T, H, .], or [H, .] where all tokens share them; the first is [B, T, H, .]. Invalid
            tokens become zeros, with which a rule leaves the state untouched.
        state_BHKV: before the first token; its dtype is that of the accumulators.
        reset_BT, valid_BT: as in `wkv6`.
    """
    if reset_BT is not None and valid_BT is not None:
        reset_BT = reset_BT & valid_BT
    return _recur(plain, trained, operands, state_BHKV, reset_BT, valid_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recur(plain, trained, operands, state, reset_BT, valid_BT):
    return _forward(plain, plain, operands, state, reset_BT, valid_BT)[0]


def _forward(_, rule, operands, state, reset_BT, valid_BT):
    T, dtype = operands[0].shape[1], state.dtype
    chunk, starts, padded, reset_BP, valid_BP = _whole_chunks(rule, operands, reset_BT, valid_BT)

    def one_chunk(carry, start):
        state, y_BPHV = carry
        tokens, reset_BC = _read(padded, reset_BP, valid_BP, start, chunk, dtype)
        new, y_BHCV, kept = rule.forward(state, tokens, reset_BC)
        return (new, _written(y_BPHV, y_BHCV, start)), (state, kept)

    y_BPHV = jnp.zeros((*padded[0].shape[:3], state.shape[-1]), dtype)
    (final, y_BPHV), saved = lax.scan(one_chunk, (state, y_BPHV), starts, unroll=len(starts) == 1)
    y_BTHV, saved = checkpoint_name((y_BPHV[:, :T], saved), "mixed")
    return (y_BTHV, final), (operands, saved, reset_BT, valid_BT)


def _backward(_, rule, residuals, cotangents):
    operands, saved, reset_BT, valid_BT = residuals
    dy_BTHV, dstate = cotangents
    T, dtype = operands[0].shape[1], dstate.dtype
    chunk, starts, padded, reset_BP, valid_BP = _whole_chunks(rule, (*operands, dy_BTHV), reset_BT, valid_BT)
    constant = [x.ndim == 2 for x in operands]

    def one_chunk(carry, start_and_saved):
        dstate, found = carry
        start, (state, kept) = start_and_saved
        (*tokens, dy_BHCV), reset_BC = _read(padded, reset_BP, valid_BP, start, chunk, dtype)
        dstate, here = rule.backward(state, tuple(tokens), reset_BC, kept, dstate, dy_BHCV)
        valid_BC = None if valid_BP is None else lax.dynamic_slice_in_dim(valid_BP, start, chunk, 1)
        here = [x if valid_BC is None else jnp.where(valid_BC[:, None, :, None], x, 0) for x in here]
        add = lambda total, x, c: total + x.sum((0, 2)) if c else _written(total, x, start)
        return (dstate, list(map(add, found, here, constant))), None

    found = [jnp.zeros(x.shape, dtype) for x in padded[:-1]]
    each = (starts, saved)
    (dstate, found), _ = lax.scan(one_chunk, (dstate, found), each, reverse=True, unroll=len(starts) == 1)
    found = (d if c else d[:, :T] for d, c in zip(found, constant, strict=True))
    return tuple(d.astype(x.dtype) for d, x in zip(found, operands, strict=True)), dstate, None, None


_recur.defvjp(_forward, _backward)


def _whole_chunks(rule, operands, reset_BT, valid_BT):
    """(tokens a chunk, first token of each, the arrays padded to whole chunks with invalid tokens)."""
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
    """Operands [B, H, C, .] and resets of one chunk. Slices are transposed here, in the cache, not whole arrays."""
    part = lambda x: None if x is None else lax.dynamic_slice_in_dim(x, start, chunk, 1)
    valid_BC = part(valid_BT)

    def read(x):
        x = x[None, :, None] if x.ndim == 2 else part(x).swapaxes(1, 2)
        x = jnp.broadcast_to(x.astype(dtype), (len(operands[0]), *x.shape[1:2], chunk, x.shape[-1]))
        return x if valid_BC is None else jnp.where(valid_BC[:, None, :, None], x, 0)

    return tuple(map(read, operands)), part(reset_BT)


def _written(x_BPHD, part_BHCD, start):
    return lax.dynamic_update_slice_in_dim(x_BPHD, part_BHCD.swapaxes(1, 2), start, 1)


class Factors(NamedTuple):
    """Weights between the tokens of a chunk, and between them and the state: P reads and Q writes a token.

    whole:   [B, H, 1, K]     decay of the state over the chunk
    past:    [B, H, P C, K]   how each read sees the state before the chunk
    end:     [B, H, Q C, K]   how the state after the chunk sees each write
    scores:  [B, H, P C, Q C] how each read sees each write
    """

    whole: jax.Array
    past: jax.Array
    end: jax.Array
    scores: jax.Array


def factors(reads: tuple, writes: tuple, w_BHCK, own_BHCPQ, reset_BC=None) -> Factors:
    """Factors of a chunk, by the halving described in the module docstring.

    Args:
        reads: P arrays [B, H, C, K]. One at t sees what i wrote decayed by exp(sum_{i<j<t} w_j).
        writes: Q arrays [B, H, C, K].
        w_BHCK: log decays, at most 0, may be -inf.
        own_BHCPQ: how reads see the writes of their own token.
        reset_BC: True where a token sees nothing before itself.
    """
    before, after, whole, *borders = _decays(w_BHCK)
    past, end = (jnp.stack([z * decay for z in zs], axis=2) for zs, decay in ((reads, before), (writes, after)))
    scores = _scores(reads, writes, borders, own_BHCPQ)
    if reset_BC is not None:  # document numbers; document 0 began before the chunk
        number_BC = jnp.cumsum(reset_BC, axis=1)
        whole = jnp.where(number_BC[:, -1, None, None, None] == 0, whole, 0)
        past = jnp.where((number_BC == 0)[:, None, None, :, None], past, 0)
        end = jnp.where((number_BC == number_BC[:, -1:])[:, None, None, :, None], end, 0)
        same_BC1C = (number_BC[:, :, None] == number_BC[:, None])[:, :, None]
        scores = jnp.where(same_BC1C[:, None, None], scores, 0)
    B, H, P, C, Q, _ = scores.shape
    rows = lambda z: z.reshape(B, H, z.shape[2] * C, z.shape[-1])
    return Factors(whole, rows(past), rows(end), scores.reshape(B, H, P * C, Q * C))


def _decays(w_BHCK):
    """Products of decays [B, H, C, K]: before each token, after each, over all ([B, H, 1, K]), and, for blocks of
    4, 8, ... tokens, between each token and the border of the block's halves.

    Exponents are products with a 0/1 matrix, where 0 * -inf would be NaN: log decays are clipped at -10000, whose
    exponential is 0 in float64 too.
    """
    tokens, w_BHCK = range(w_BHCK.shape[2]), jnp.maximum(w_BHCK, -1e4)

    def products(is_counted):
        """Products, for each t, of the decays of all j that is_counted(t, j)."""
        matrix = [[is_counted(t, j) for j in tokens] for t in tokens]
        return jnp.exp(_linear(jnp.array(matrix, w_BHCK.dtype), w_BHCK))

    border = lambda c: products(lambda t, j: t // c == j // c and (j < t if t // c % 2 else j > t))
    borders = map(border, _halves(len(tokens))[1:])  # between neighbours there is no decay
    return products(operator.gt), products(operator.lt), jnp.exp(w_BHCK.sum(2, keepdims=True)), *borders


@jax.custom_vjp
def _linear(matrix_RC, x_BHCK):
    """matrix x. Its automatic derivative would transpose the operand, a tenth of the total time."""
    return matmul(matrix_RC, x_BHCK)


_linear.defvjp(lambda matrix, x: (_linear(matrix, x), matrix), lambda matrix, dy: (None, matmul(matrix.T, dy)))


def _halves(C):
    """1, 2, 4, ... C/2."""
    return [1 << i for i in range(C.bit_length() - 1)]


def _half(z_BHCK, c, later):
    """[B, H, n, c, K]: the earlier (0) or later (1) half of each block of 2c tokens."""
    B, H, C, K = z_BHCK.shape
    return z_BHCK.reshape(B, H, C // (2 * c), 2, c, K)[:, :, :, later]


def _scores(reads, writes, borders, own_BHCPQ):
    """[B, H, P, C, Q, C]: blocks of one token, then of two, ... until one block is the chunk.

    Reads and writes are lists: in one array, the decay's gradient would be a sum over P, which takes longer than the
    products on a CPU.
    """
    B, H, C, P, Q = own_BHCPQ.shape
    scores = own_BHCPQ[:, :, :, :, None, :, None]
    for c, decay in zip(_halves(C), [1, *borders], strict=False):
        n = C // (2 * c)
        later_reads = jnp.concatenate([_half(z * decay, c, 1) for z in reads], axis=3)
        first_writes = jnp.concatenate([_half(z * decay, c, 0) for z in writes], axis=3)
        across = matmul(later_reads, first_writes.mT).reshape(B, H, n, P, c, Q, c)
        blocks = scores.reshape(B, H, n, 2, P, c, Q, c)
        first, later = blocks[:, :, :, 0], blocks[:, :, :, 1]
        top = jnp.concatenate([first, jnp.zeros_like(across)], axis=-1)
        scores = jnp.concatenate([top, jnp.concatenate([across, later], axis=-1)], axis=4)
    return scores[:, :, 0]


@jax.custom_vjp
def inverse(m_BHCC):
    """(I - M)^-1 of a strictly lower triangular M, C a power of 2: the block size doubles in each round.

    It avoids powers of M: with repeated keys they reach 1e17 at C = 64, while the inverse's entries stay near 1. XLA's
    triangular solve takes 70 times as long on a CPU.
    """
    B, H, C, _ = m_BHCC.shape
    x = jnp.ones((B * H * C, 1, 1), m_BHCC.dtype)
    for c in _halves(C):
        n = C // (2 * c)
        blocks, i = m_BHCC.reshape(B * H, n, 2, c, n, 2, c), jnp.arange(n)
        across = blocks[:, i, 1, :, i, 0].swapaxes(0, 1).reshape(B * H * n, c, c)  # from the earlier half to the later
        first, later = x.reshape(B * H * n, 2, c, c).swapaxes(0, 1)
        low = jnp.concatenate([matmul(matmul(later, across), first), later], axis=2)
        x = jnp.concatenate([jnp.concatenate([first, jnp.zeros_like(first)], axis=2), low], axis=1)
    return x.reshape(m_BHCC.shape)


def _inverse_forward(m):
    x = inverse(m)
    return x, x


def _inverse_backward(x, dx):
    """dM = X^T dX X^T."""
    return (matmul(matmul(x.mT, dx), x.mT),)


inverse.defvjp(_inverse_forward, _inverse_backward)
