"""RWKV-7, "Goose" (arXiv:2503.14456), as the released code computes it, under released names.

The state of a head is a memory that each token corrects: it removes part of the value at its key before it writes
there (`ops.wkv7`). Where paper and code disagree, code wins: the gate of the value residual weighs the first layer's
value, not the layer's own.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models import heads
from rwkv_jax.models.block import BlockConfig, Kind
from rwkv_jax.models.heads import (
    ChannelMix,
    HeadNorm,
    given_ranks,
    head_shape,
    low_rank,
    pre_norm,
    shift,
    shift_ramp,
    split_heads,
)
from rwkv_jax.models.layers import (
    absent,
    depth_ratios,
    observe,
    observed,
    on_own_rows,
    orthogonal,
    token_shift,
    vector,
)
from rwkv_jax.ops.wkv7 import FORMS, RULES, wkv7

zeros = nn.initializers.zeros
STRONGEST = -math.exp(-0.5)  # bound of all log decays: a channel keeps more than exp(STRONGEST) = 0.545 in a step


@dataclass(frozen=True)
class Variant:
    """Ablation switches; the defaults are the released model."""

    # factor of what the key removes; 0: no delta rule; 2: a transition can swap and negate (eigenvalues to -1)
    removal: float = 1.0
    in_context_rate: bool = True  # False: a = 1, the whole value found is removed and k kept; no a0, a1, a2, k_a
    value_residual: bool = True  # False: the layer's own v, no v0, v1, v2
    bonus: bool = True  # False: no r_k
    token_shift: bool = True  # False: all inputs from the current token alone, no x_*; the state keeps its shapes


class TimeMix(nn.Module):
    """o_t = W_o ((norm(wkv_t) + bonus_t) * g_t), with inputs x + (x_{t-1} - x) mu.

    log w = -exp(-1/2) sigmoid(w0 + tanh(x_w w1) w2)     a = sigmoid(a0 + x_a a1 a2)     g = sigmoid(x_g g1) g2
    v <- v + (v_first - v) sigmoid(v0 + x_v v1 v2)       in all layers but the first
    kappa = k * k_k, of length 1 in each head            k <- k (1 + (a - 1) k_a)         bonus = (sum_K r k r_k) v
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, state, reset_BT, valid_BT, layer, first_BTD):
        config, variant, D, (H, K) = self.config, self.config.variant, self.config.dim, head_shape(self.config)
        up, down = depth_ratios(layer, config.num_layers)
        rank_w, rank_a, rank_v, rank_g = low_ranks(config)
        each = lambda name, value: vector(self, name, value, D, config.param_dtype)[None, None].astype(config.dtype)
        # over all channels from -1/2 to 1/2, and over those of each head from -1 to 1, squared with the sign kept
        line = lambda: jnp.arange(D) / max(D - 1, 1) - 0.5
        within = lambda: (jnp.arange(D) % K - (K - 1) / 2) / max((K - 1) / 2, 0.5)
        curve = lambda: within() * jnp.abs(within())

        previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        x = {c: _input(self, c, power * down, x_BTD, previous_BTD) for c, power in powers.items()}

        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0}
        matrix = lambda name: config.linear(D, kernel_init=orthogonal(gains[name]), name=name)(x[name[0]])
        r_BTD, k_BTD, v_BTD = (checkpoint_name(matrix(name), name) for name in gains)
        observe(self, "k_max", lambda: jnp.abs(k_BTD).max())

        bias = lambda: -6 + 6 * ((line() + 0.5) ** (1 + up**0.3)) + 0.5 + 2.5 * curve()
        w0_D = vector(self, "w0", bias, D, config.wide_param)
        moved_BTD = low_rank(self, "w", x["w"], rank_w, nn.tanh).astype(config.wide)
        w_BTD = (STRONGEST * nn.sigmoid(w0_D[None, None] + moved_BTD)).astype(config.wide)
        if variant.in_context_rate:
            a0 = each("a0", lambda: -0.19 + 0.3 * curve() + 0.4 * line())
            a_BTD = nn.sigmoid(a0 + low_rank(self, "a", x["a"], rank_a))
        else:
            absent(self, "a0", "a1", "a2")
            a_BTD = jnp.ones_like(x_BTD)
        g_BTD = low_rank(self, "g", x["g"], rank_g, nn.sigmoid)
        if first_BTD is None:
            first_BTD = v_BTD
        elif variant.value_residual:
            v0 = each("v0", lambda: 0.73 - 0.4 * line())
            v_BTD += (first_BTD - v_BTD) * nn.sigmoid(v0 + low_rank(self, "v", x["v"], rank_v))
        else:
            absent(self, "v0", "v1", "v2")

        kappa_BTHK = unit(split_heads(k_BTD * each("k_k", lambda: 0.71 - 0.1 * line()), config))
        if variant.in_context_rate:
            k_BTD *= 1 + (a_BTD - 1) * each("k_a", lambda: jnp.full(D, 1.02))
        else:
            absent(self, "k_a")
        r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK = (split_heads(y, config) for y in (r_BTD, w_BTD, k_BTD, v_BTD, a_BTD))
        removed_BTHK = variant.removal * kappa_BTHK * a_BTHK
        wkv = lambda _, rows: wkv7(*rows[:7], reset_BT=rows[7], valid_BT=rows[8], impl=config.impl)
        rows = (r_BTHK, w_BTHK, k_BTHK, v_BTHV, -kappa_BTHK, removed_BTHK, state, reset_BT, valid_BT)
        with jax.named_scope("wkv"):
            y_BTHV, state = on_own_rows(wkv)((), rows)
        y_BTD = HeadNorm(config, name="ln_x")(y_BTHV, layer)
        if variant.bonus:
            r_k_HK = vector(self, "r_k", lambda: jnp.full((H, K), -0.04), (H, K), config.param_dtype)
            bonus_BTHV = (r_BTHK * k_BTHK * r_k_HK[None, None].astype(config.dtype)).sum(-1, keepdims=True) * v_BTHV
            y_BTD += bonus_BTHV.reshape(y_BTD.shape)
        else:
            absent(self, "r_k")
        o_BTD = config.linear(D, kernel_init=zeros, name="output")(y_BTD * g_BTD)
        return checkpoint_name(o_BTD, "att"), last_BD, state, first_BTD


def unit(x_BTHK):
    """x / max(|x|, 1e-12) for each head, with a finite gradient at 0, as in torch's `normalize`."""
    wide = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24))).astype(x_BTHK.dtype)


def _input(module, letter, power, x_BTD, previous_BTD):
    """x + (x_{t-1} - x) mu, or x itself without token shift."""
    if not module.config.variant.token_shift:
        absent(module, f"x_{letter}")
        return x_BTD
    D = module.config.dim
    mix_D = vector(module, f"x_{letter}", shift_ramp(D, power), D, module.config.param_dtype)
    return shift(x_BTD, previous_BTD, mix_D)


def _channel_inputs(module, x_BTD, previous_BTD, layer):
    power = depth_ratios(layer, module.config.num_layers)[1] ** 4
    return {"k": _input(module, "k", power, x_BTD, previous_BTD)}


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)); the first layer passes its values to all later ones."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer, first_BTD):
        att = TimeMix(self.config, name="att")
        ffn = ChannelMix(self.config, _channel_inputs, hidden_dim(self.config), name="ffn")
        return pre_norm(self, att, ffn, x_BTD, state, reset_BT, valid_BT, layer, first_BTD)


def hidden_dim(config: BlockConfig) -> int:
    return config.hidden_dim or 4 * config.dim


def low_ranks(config: BlockConfig) -> tuple[int, int, int, int]:
    """Widths of the low-rank maps of w, a, v and g: multiples of 32 near 2.5, 2.5, 1.7 and 5 times sqrt(D).

    The rule of the current trainer (RWKV-LM, RWKV-v7/train_temp); released models differ, see `SIZES`.
    """
    return given_ranks(config, tuple(max(32, 32 * round(f * config.dim**0.5 / 32)) for f in (2.5, 2.5, 1.7, 5)))


def flops(config: BlockConfig, seq_len: int) -> float:
    """Training FLOPs: 6 a weight of a matrix product, and 3 times WKV's forward products in chunks of C tokens, 8 K V
    + 12 C V a head, without recomputation in its backward pass. The first layer, without v1 and v2, counts alike.
    """
    D, K, C, variant = config.dim, head_shape(config)[1], RULES["chunked"].chunk, config.variant
    rank_w, rank_a, rank_v, rank_g = low_ranks(config)
    ranks = rank_w + variant.in_context_rate * rank_a + variant.value_residual * rank_v + rank_g
    matrices = 4 * D**2 + 2 * D * hidden_dim(config) + 2 * D * ranks
    return 6 * matrices + 3 * D * (8 * K + 12 * C)


def to_rwkv(state: heads.LayerState) -> list:
    """Arrays of the `rwkv` package, which keeps the matrices of this version as [H, V, K]."""
    return [state.att_last, state.wkv.swapaxes(1, 2), state.ffn_last]


def from_rwkv(arrays) -> heads.LayerState:
    att_last, wkv_HVK, ffn_last = arrays
    return heads.LayerState(att_last, wkv_HVK.swapaxes(1, 2), ffn_last)


def _size(num_layers, dim, ranks, vocab_size=65536):
    return {"vocab_size": vocab_size, "num_layers": num_layers, "dim": dim, "low_ranks": ranks}


# Released World models by size, and those trained on the Pile, whose low-rank widths are those of RWKV-LM's
# RWKV-v7/rwkv_v7_demo.py at their release.
SIZES = {
    "0.1b": _size(12, 768, (64, 64, 32, 128)),
    "0.4b": _size(24, 1024, (64, 64, 32, 128)),
    "1.5b": _size(24, 2048, (96, 96, 64, 256)),
    "2.9b": _size(32, 2560, (96, 96, 64, 320)),
    "7.2b": _size(32, 4096, (128, 128, 96, 480)),
    "169m": _size(12, 768, (64, 64, 32, 128), 50304),
    "421m": _size(24, 1024, (64, 64, 64, 128), 50304),
    "1b5": _size(24, 2048, (96, 96, 64, 256), 50304),
}

KIND = Kind(
    block=Block,
    init_state=heads.init_state,
    flops=flops,
    # at 64, 128 and 256 the best of `python -m experiments.compare.run --sweep` for short byte-level runs
    learning_rates=((64, 4e-3), (128, 4e-3), (256, 2e-3), *heads.RELEASED_RATES),
    recipe=heads.RECIPE,
    variant=Variant,
    forms=FORMS,
    unseen=heads.unseen,
    low_ranks=low_ranks,
    shares_first=True,
    recomputed={"outputs": 7, "block": 8},
    memory_traffic=156,
    groups=((r"/w0$", 2.0),),
    kept_wide=r"/w0$",  # rounding it loses long memory
    observe=observed,
    tuned_start=heads.tuned_start,
    tuned_state=heads.tuned_state,
    to_rwkv=to_rwkv,
    from_rwkv=from_rwkv,
    fields={"embedding_init": "v5"},
    sizes=SIZES,
    formats=("pth", "huggingface", "rwkv.cpp"),
    released="RWKV-7",
)
