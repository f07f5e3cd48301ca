"""The contract between a kind of layer and the rest of the code.

A kind of layer is one file of this folder, whose `KIND` is all that other code knows of it, and one line of
`models.kinds.KINDS`. Its block is a linen module with one field, `config`:

    x_BTD, state = Block(config)(x_BTD, state, reset_BT, valid_BT, layer)

`state` comes from `KIND.init_state` or an earlier call, or is None where there is no past. `reset_BT` and `valid_BT`
are as in `LM.hidden`, or None; no reset is on padding. `layer` is the layer's number from 0, a float32 that may be
traced. With `shares_first` the first layer of a kind passes values to the later ones: a block takes them as `first`,
None in the first layer, and returns them:

    x_BTD, state, first = Block(config)(x_BTD, state, reset_BT, valid_BT, layer, first)
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rwkv_jax.models.layers import LayerNorm, Linear, matmul

RELEASED_EPSILON = 64e-5  # of the norm of each head, in all released code of RWKV-5, 6 and 7


class Switches(dict):
    """A hashable dict of switches, so that a model can be a static argument of `jax.jit`."""

    def __hash__(self):
        return hash(tuple(sorted(self.items())))


@dataclass(frozen=True)
class NoVariant:
    """Switches of a kind that has none."""


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and dtypes of a block; fields are those of `LM`."""

    dim: int
    num_layers: int
    hidden_dim: int | None = None  # None: the kind's own multiple of `dim`
    head_size: int = 64
    head_norm_epsilon: float = RELEASED_EPSILON
    low_ranks: tuple[int, ...] | None = None  # None: the kind's own rule
    dtype: str = "float32"
    param_dtype: str = "float32"
    matmul_precision: str | None = None
    dropout: float = 0.0
    impl: str | None = None  # form of the kind's operator
    variant: Any = NoVariant()  # an instance of the kind's `variant`

    @property
    def wide(self):
        """Dtype of states and accumulators: float32 at least."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def wide_param(self):
        """Dtype of parameters whose rounding would lose long memory, such as decays: float32 at least."""
        return jnp.promote_types(self.param_dtype, jnp.float32)

    def linear(self, features: int, **kw) -> Linear:
        """x W, without bias."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Linear(features, precision=self.matmul_precision, **dtypes, **kw)

    def product(self, x, matrix):
        """x @ matrix, for a parameter that is not a `Linear`."""
        return matmul(x.astype(self.dtype), matrix.astype(self.dtype), None, self.matmul_precision)

    def norm(self, **kw) -> nn.LayerNorm:
        return LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype, **kw)


@dataclass(frozen=True)
class Kind:
    """All that other code knows of a kind of layer. Regular expressions are over paths: "blocks/att/key/kernel".

    Rules match parameters of all kinds by name: a name means the same in every kind.
    """

    block: type[nn.Module]
    init_state: Callable  # (config, batch, max_length) -> state of one layer without a past
    flops: Callable[[BlockConfig, int], float]  # of training, a token and layer, at a sequence length
    learning_rates: Sequence[tuple[int, float]]  # (width, rate) ascending, at least one: see `optim.default_lr`
    recipe: Mapping[str, Any] = field(default_factory=dict)  # of the released trainer: fields of `optim` in configs
    variant: type = NoVariant  # frozen dataclass of the kind's ablation switches; the defaults are the released model
    forms: Sequence[str] = ()  # of its operator: values of `LM.wkv_impl` beside None
    shares_first: bool = False  # the first layer of this kind passes values to the later ones
    cached: Callable | None = None  # state -> (begin, end) [B] of the slots in use, if the state grows
    unseen: Callable = lambda config: None  # config -> settings that no parameter's shape shows
    recomputed: Mapping[str, float] = field(default_factory=dict)  # see `hardware.recomputed_flops_per_token`
    memory_traffic: float = 120.0  # activations moved through memory in a step, in D a token: see `rehearse`
    groups: Sequence[tuple[str, float]] = ()  # (regex, factor) of the learning rate, as the released trainer has them
    decayed: str = r"/kernel$"  # parameters with weight decay
    kept_wide: str | None = None  # parameters that stay float32 at least, whatever `param_dtype`
    observe: Callable = lambda params, sown: {}  # (layer's parameters, what it sowed) -> see `train.diagnostics`
    tuned_start: Callable | None = None  # config -> initial tree of state tuning; None: unsupported
    tuned_state: Callable | None = None  # such a tree -> state of one layer, leaves without the batch axis
    to_rwkv: Callable | None = None  # such a state of NumPy arrays -> its list of arrays in the `rwkv` package
    from_rwkv: Callable | None = None  # the inverse
    low_ranks: Callable | None = None  # config -> widths of its low-rank maps; ValueError for invalid ones
    fields: Mapping[str, Any] = field(default_factory=dict)  # of `LM`, where a model of this kind has another default
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # fields of `LM` by name of a released size
    released: str | None = None  # name of the version whose released files `interop` reads and writes
    world_template: str = "user"  # names of the speakers in chats of the released World models: see `generate.chat`
    formats: Sequence[str] = ()  # of `interop.FORMATS`, those that hold models as released


def make_variant(cls: type, given: Mapping[str, Any]):
    """An instance of `cls` with the given switches.

    Raises:
        ValueError: an unknown switch, or a value of the wrong type or outside its choices.
    """
    hints = typing.get_type_hints(cls)
    for name, value in given.items():
        check_choice("switch of model.variant", name, hints)
        if typing.get_origin(hints[name]) is typing.Literal:
            check_choice(f"model.variant.{name}", value, typing.get_args(hints[name]))
        elif type(value) is not hints[name]:
            raise ValueError(f"model.variant.{name} is {value!r}, expected a {hints[name].__name__}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"model.variant.{name} is {value!r}, expected a finite float")
    return cls(**given)


def switches(cls: type) -> dict[str, tuple[type, Any]]:
    """Type and default of each switch."""
    hints = typing.get_type_hints(cls)
    plain = lambda hint: type(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Literal else hint
    return {f.name: (plain(hints[f.name]), f.default) for f in dataclasses.fields(cls)}


def check_choice(what: str, given, known) -> None:
    """Raise ValueError, suggesting the nearest name, unless `given` is among `known`."""
    if given not in list(known):  # which a value without a hash may be compared with
        near = difflib.get_close_matches(str(given), [str(k) for k in known], n=1, cutoff=0.5)
        expected = f"expected one of {', '.join(map(str, known))}" if known else "expected none"
        hint = f"did you mean {near[0]!r}?" if near else expected
        raise ValueError(f"unknown {what} {given!r}: {hint}")
