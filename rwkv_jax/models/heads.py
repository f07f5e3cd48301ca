"""Parts that RWKV-5, 6 and 7 share: heads with a matrix state, their norm, channel mixing, the tuned state."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models.block import RELEASED_EPSILON, BlockConfig
from rwkv_jax.models.layers import batch_sharded, dropout, mix_ramp, observe, orthogonal, token_shift, vector

zeros = nn.initializers.zeros
LARGEST_RANK = 2**20  # far beyond any model, like `lm.LARGEST`
SMALL = orthogonal(0.1, widened=False)  # of the outer matrix of a low-rank map
# (width, rate): of the World models of RWKV-5 and 6 (arXiv:2404.05892); at 768 of RWKV-LM's train.py
RELEASED_RATES = ((768, 6e-4), (1024, 4e-4), (2048, 3e-4), (2560, 2e-4), (4096, 1.5e-4))
# RWKV-LM, RWKV-v7/train_temp/demo-training-run-v7-pile.sh. Output matrices start at zero, so gradients of
# the matrices before them are tiny at first: with an epsilon of 1e-8 these would barely move.
RECIPE = {"schedule": "cosine", "eps": 1e-18, "weight_decay": 0.1}


class LayerState(NamedTuple):
    """The past of a layer: 2 D + D K numbers, whatever the length."""

    att_last: jax.Array  # [B, D] last input of time mixing, after ln1
    wkv: jax.Array  # [B, H, K, V], float32 at least
    ffn_last: jax.Array  # [B, D] last input of channel mixing, after ln2


def head_shape(config: BlockConfig) -> tuple[int, int]:
    """(H, K): the number of heads and the width of each. A model narrower than a head has one.

    Raises:
        ValueError: D is not a multiple of the heads' width.
    """
    K = min(config.head_size, config.dim)
    if config.dim % K:
        raise ValueError(f"dim is {config.dim}, expected a multiple of head_size {K}")
    return config.dim // K, K


def init_state(config: BlockConfig, batch: int, max_length: int | None = None) -> LayerState:
    """The empty state, zeros, of one size whatever `max_length`."""
    H, K = head_shape(config)
    empty = lambda *shape: jnp.zeros(shape, config.wide)  # an array for each leaf, so that a state can be donated
    return LayerState(empty(batch, config.dim), empty(batch, H, K, K), empty(batch, config.dim))


def given_ranks(config: BlockConfig, rule: tuple[int, ...]) -> tuple[int, ...]:
    """`config.low_ranks`, or `rule` where it is None.

    Raises:
        ValueError: they are not as many as in `rule`, or not all integers from 1 to `LARGEST_RANK`.
    """
    ranks = rule if config.low_ranks is None else config.low_ranks
    if len(ranks) != len(rule) or not all(type(rank) is int and 1 <= rank <= LARGEST_RANK for rank in ranks):
        expected = f"{len(rule)} positive integers, at most {LARGEST_RANK}"
        raise ValueError(f"model field low_ranks is {ranks!r}, expected {expected}")
    return ranks


def unseen(config: BlockConfig) -> float | None:
    """The epsilon of the heads' norm, which no shape shows, or None for the released one."""
    return None if config.head_norm_epsilon == RELEASED_EPSILON else config.head_norm_epsilon


def split_heads(x_BTD, config: BlockConfig):
    return x_BTD.reshape(*x_BTD.shape[:2], *head_shape(config))


def shift(x_BTD, previous_BTD, mix_D):
    """x_t + mix * (x_{t-1} - x_t). RWKV-4 and 5 store 1 - mix instead, see `layers.lerp`."""
    return x_BTD + (previous_BTD - x_BTD) * mix_D[None, None].astype(x_BTD.dtype)


def shift_ramp(dim: int, power, offset=0.0):
    """A function that returns 1 - (i / D)^power - offset: `layers.mix_ramp` for `shift`."""
    return lambda: 1 - mix_ramp(dim, power, offset)()


def bonus_init(config: BlockConfig, up):
    """A function that returns r0 (1 - n / (D - 1)) + 0.1 ((n + 1) mod 3 - 1) for channel n, [H, K]."""
    D = config.dim

    def value():
        n = jnp.arange(D)
        return (up * (1 - n / max(D - 1, 1)) + 0.1 * ((n + 1) % 3 - 1)).reshape(head_shape(config))

    return value


def decay_init(dim: int, up):
    """A function that returns -6 + 5 (n / (D - 1))^(0.7 + 1.3 r0) for channel n, r0 = l / (L - 1)."""
    return lambda: -6 + 5 * (jnp.arange(dim) / max(dim - 1, 1)) ** (0.7 + 1.3 * up)


class HeadNorm(nn.Module):
    """Layer norm of each head by itself, with a scale and a bias for each channel: `ln_x`, the released group norm.

    The released epsilon is 64e-5, whatever the width of a head. RWKV-5's code divides by 8 first and uses 1e-5.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, y_BTHK, layer):
        D, dtype = self.config.dim, self.config.param_dtype
        scale_D = vector(self, "scale", lambda: jnp.full(D, ((1 + layer) / self.config.num_layers) ** 0.7), D, dtype)
        bias_D = vector(self, "bias", lambda: jnp.zeros(D), D, dtype)
        wide = y_BTHK.astype(self.config.wide)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.config.head_norm_epsilon)
        scale, bias = (x[None, None].astype(wide.dtype) for x in (scale_D, bias_D))
        return (normed.reshape(*y_BTHK.shape[:2], D) * scale + bias).astype(self.config.dtype)


def low_rank(module, name: str, x_BTD, rank: int, inner: Callable = lambda x: x, init=SMALL):
    """inner(x W_1) W_2 with the parameters `name`1 [D, rank], zero at the start, and `name`2 [rank, D]."""
    D, dtype = module.config.dim, module.config.param_dtype
    down = module.param(f"{name}1", zeros, (D, rank), dtype)
    up = module.param(f"{name}2", init, (rank, D), dtype)
    inside = checkpoint_name(module.config.product(x_BTD, down), "low_rank")
    return checkpoint_name(module.config.product(inner(inside), up), "low_rank")


class ChannelMix(nn.Module):
    """o_t = sigmoid(W_r x_r) * W_v max(W_k x_k, 0)^2, each input from the current and the previous token.

    `inputs(module, x, previous, layer)` returns them by letter; without an "r" there is no gate, as in RWKV-7.
    """

    config: BlockConfig
    inputs: Callable
    hidden_dim: int

    @nn.compact
    def __call__(self, x_BTD, last_BD, reset_BT, valid_BT, layer):
        previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        inputs = self.inputs(self, x_BTD, previous_BTD, layer)
        matrix = lambda name, F, init: self.config.linear(F, kernel_init=init, name=name)
        k_BTF = checkpoint_name(matrix("key", self.hidden_dim, orthogonal(widened=False))(inputs["k"]), "ffn_key")
        observe(self, "active_F", lambda: (k_BTF > 0).any((0, 1)))
        o_BTD = checkpoint_name(matrix("value", self.config.dim, zeros)(jnp.square(nn.relu(k_BTF))), "ffn_value")
        if "r" in inputs:
            r_BTD = matrix("receptance", self.config.dim, zeros)(inputs["r"])
            o_BTD = nn.sigmoid(checkpoint_name(r_BTD, "ffn_receptance")) * o_BTD
        return o_BTD, last_BD


def pre_norm(block, att, ffn, x_BTD, state, reset_BT, valid_BT, layer, *first):
    """x + att(ln1(x)), then x + ffn(ln2(x)), for the block that calls it; token shift sees the normed input.

    Returns what a block returns. `first` holds the further value that `att` takes and returns, if any.
    """
    config = block.config
    att_last, wkv, ffn_last = state or (None, None, None)
    ln1, ln2 = config.norm(name="ln1"), config.norm(name="ln2")
    x_BTD = batch_sharded(x_BTD)
    h_BTD, att_last, wkv, *first = att(ln1(x_BTD), att_last, wkv, reset_BT, valid_BT, layer, *first)
    x_BTD = dropout(block, x_BTD + h_BTD, config.dropout)
    h_BTD, ffn_last = ffn(ln2(x_BTD), ffn_last, reset_BT, valid_BT, layer)
    x_BTD = batch_sharded(dropout(block, x_BTD + h_BTD, config.dropout))
    return x_BTD, LayerState(att_last, wkv, ffn_last), *first


def tuned_start(config: BlockConfig) -> dict:
    """Initial values of state tuning: zero matrices [H, K, V]. att_last and ffn_last stay zero, as released."""
    H, K = head_shape(config)
    return {"wkv": jnp.zeros((H, K, K), config.wide)}


def tuned_state(tuned) -> LayerState:
    H, K, _ = tuned["wkv"].shape
    last_D = jnp.zeros(H * K, tuned["wkv"].dtype)
    return LayerState(last_D, tuned["wkv"], last_D)
