"""Judges that hold for every recurrence of `rwkv_jax.ops`: masks, any split of T, and errors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sized(NamedTuple):
    """A result in float64, and the same sum with absolute values in place of its terms: where terms cancel, a relative
    error in each of them is an error relative to the magnitude and not to the result."""

    value: np.ndarray
    magnitude: np.ndarray

    def over_rows(self, allowed) -> "Sized":
        """The sum over rows, its magnitude in units of the error `allowed` [B, 1] to each: check it with 1."""
        return Sized(self.value.sum(0), (allowed * self.magnitude).sum(0))


def masks_of(rows) -> dict:
    """`reset_BT` and `valid_BT` of rows of one letter a token, "." for padding, a capital where a document starts.

    Padding has resets, which an operator ignores.
    """
    letters = np.array([list(row) for row in rows])
    valid_BT = letters != "."
    return {"reset_BT": np.char.isupper(letters) | ~valid_BT, "valid_BT": valid_BT}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(op, impl, lengths, operands, state, dy, masks=None):
    """(y, final state, (gradients of the operands, gradient of `state`)) of sum(dy * y), `op` called once for each of
    `lengths` with the state of the call before. Operands of three axes or more are [B, T, ...], others go to each."""

    def loss(operands, state):
        ys, begin = [], 0
        for length in lengths:
            cut = slice(begin, begin + length)
            piece = [x[:, cut] if x.ndim > 2 else x for x in operands]
            y, state = op(*piece, state, impl=impl, **{name: x[:, cut] for name, x in (masks or {}).items()})
            ys.append(y)
            begin += length
        y = jnp.concatenate(ys, axis=1)
        return (y.astype(dy.dtype) * dy).sum(), (y, state)

    grads, (y, state) = jax.grad(loss, argnums=(0, 1), has_aux=True)(operands, state)
    return y, state, grads


def check(actual, expected: Sized, allowed, dtype=np.float32, terms=1.0):
    """|actual - expected| <= allowed * magnitude for every element; weights that underflow count for nothing.

    Where the magnitude is 0, as of a gradient across a reset or of padding, the result is 0.

    `terms`: size of the sum that such a weight is a factor of.
    """
    actual, (value, magnitude) = np.asarray(actual, np.float64), expected
    assert actual.shape == value.shape
    finite = np.isfinite(value)  # the log weight of an empty past is not
    np.testing.assert_array_equal(actual[~finite], value[~finite])
    allowed = np.broadcast_to(np.reshape(allowed, (-1, *[1] * (actual.ndim - 1))), actual.shape)
    actual, value, magnitude, allowed = (x[finite] for x in (actual, value, magnitude, allowed))
    assert np.isfinite(actual).all() and not actual[magnitude == 0].any()
    floor = terms * np.finfo(dtype).tiny / np.finfo(dtype).eps
    error = np.abs(actual - value) / (magnitude + floor)
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


def check_rounded(actual, expected: Sized, allowed):
    """`check` of float32 with a single rounding to bfloat16, by half a unit in the last place."""
    assert actual.dtype == jnp.bfloat16
    error = np.abs(np.float64(actual) - expected.value)
    before_rounding = allowed[..., None] * expected.magnitude + np.finfo(np.float32).tiny
    half = jnp.finfo(jnp.bfloat16).eps / 2 * np.abs(expected.value)
    assert (error <= half + (1 + 2**-7) * before_rounding).all()
