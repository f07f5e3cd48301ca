"""The operators under test, one per version: that of RWKV-5 is `ops.wkv6` with one decay for all tokens.

Errors are separated along the last axis of inputs and results: channels of WKV-4, heads of the others.
"""

from collections.abc import Callable
from typing import NamedTuple

from experiments.precision import bounds, judge, judge_matrices, matrices, vectors


class Operator(NamedTuple):
    """One operator under test.

    Attributes:
        inputs: (T, dtype) -> tuple of arrays.
        exact: (*inputs) -> {name: (value, magnitude)} in float64.
        sides: (T, dtype) -> {side: function (*inputs) -> {name: value}}, for the forms of the operator and its peers.
        allowed: (form, name, *inputs) -> largest error of a float32 result, relative to its magnitude.
        rounded: names of the results that have the dtype of the inputs.
        channels: names along the last axis, kind of input by kind.
        decays: number of decays of each kind; the first kind is the mild one.
        bound: `allowed` in words.
        steps: the steps of each form in words.
    """

    inputs: Callable
    exact: Callable
    sides: Callable
    allowed: Callable
    rounded: tuple
    channels: list
    decays: int
    bound: str
    steps: dict


WKV4 = Operator(
    inputs=vectors.inputs,
    exact=judge.exact,
    sides=vectors.sides,
    allowed=vectors.allowed,
    rounded=("y", "k", "v"),
    channels=vectors.CHANNELS,
    decays=len(vectors.LOG_DECAYS),
    bound=bounds.BOUND,
    steps={form: text for form, (text, _) in bounds.STEPS.items()},
)
WKV6 = Operator(
    inputs=matrices.inputs6,
    exact=judge_matrices.exact6,
    sides=matrices.sides6,
    allowed=matrices.allowed,
    rounded=("y", "r", "k", "v"),
    channels=matrices.HEADS6,
    decays=len(matrices.DECAYS6),
    bound=bounds.MATRIX_BOUND,
    steps=bounds.MATRIX_STEPS,
)
WKV5 = WKV6._replace(inputs=matrices.inputs5, exact=judge_matrices.exact5)
WKV7 = WKV6._replace(
    inputs=matrices.inputs7,
    exact=judge_matrices.exact7,
    sides=matrices.sides7,
    rounded=("y", "r", "k", "v", "a", "b"),
    channels=matrices.HEADS7,
    decays=len(matrices.DECAYS7),
)
OPERATORS = {"WKV-4": WKV4, "WKV-5": WKV5, "WKV-6": WKV6, "WKV-7": WKV7}
