"""RWKV-6, "Finch" (arXiv:2404.05892, section 4.2), as the released code computes it, under released names.

RWKV-5 with a decay, and a mix of the current and the previous token, that depend on the text: low-rank maps of the
input add to the constants of RWKV-5.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models import heads, rwkv5
from rwkv_jax.models.block import BlockConfig, Kind
from rwkv_jax.models.heads import (
    ChannelMix,
    given_ranks,
    head_shape,
    low_rank,
    pre_norm,
    shift,
    shift_ramp,
    split_heads,
)
from rwkv_jax.models.layers import depth_ratios, observed, on_own_rows, token_shift, vector
from rwkv_jax.ops.wkv6 import FORMS, wkv6

zeros = nn.initializers.zeros
LETTERS = "wkvrg"  # the order of the inputs in time_maa_w1 and time_maa_w2


class TimeMix(nn.Module):
    """o_t = W_o (norm(wkv_t) * silu(g_t)); inputs x + (x_{t-1} - x) (mu + m(x)), log decay -exp(d + d(x))."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, state, reset_BT, valid_BT, layer):
        config, D = self.config, self.config.dim
        up, _ = depth_ratios(layer, config.num_layers)
        previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        inputs = self._inputs(x_BTD, previous_BTD, layer)
        decay_D = vector(self, "time_decay", heads.decay_init(D, up), D, config.wide_param)
        moved_BTD = low_rank(self, "time_decay_w", inputs["w"], low_ranks(config)[1], nn.tanh, small_uniform)
        w_BTD = -jnp.exp(decay_D[None, None] + moved_BTD.astype(config.wide)).astype(config.wide)
        bonus = vector(self, "time_faaaa", heads.bonus_init(config, up), head_shape(config), config.wide_param)
        u_HK = bonus.astype(config.wide)
        r_BTHK, k_BTHK, v_BTHV, gate_BTD = rwkv5.projections(self, inputs)
        wkv = lambda shared, rows: wkv6(
            *rows[:4], *shared, rows[4], reset_BT=rows[5], valid_BT=rows[6], impl=config.impl
        )
        rows = (r_BTHK, split_heads(w_BTD, config), k_BTHK, v_BTHV, state, reset_BT, valid_BT)
        with jax.named_scope("wkv"):
            y_BTHV, state = on_own_rows(wkv)((u_HK,), rows)
        return rwkv5.output(self, y_BTHV, gate_BTD, layer), last_BD, state

    def _inputs(self, x_BTD, previous_BTD, layer):
        """Inputs by letter. All five corrections come from one product with `time_maa_w1`, through one tanh."""
        config, D, rank = self.config, self.config.dim, low_ranks(self.config)[0]
        up, down = depth_ratios(layer, config.num_layers)
        ramps = dict.fromkeys("xwk", shift_ramp(D, down)) | {"v": shift_ramp(D, down, 0.3 * up)}
        ramps |= dict.fromkeys("rg", shift_ramp(D, 0.5 * down))
        mix = {
            letter: vector(self, f"time_maa_{letter}", ramp, D, config.param_dtype) for letter, ramp in ramps.items()
        }
        first = self.param("time_maa_w1", zeros, (D, 5 * rank), config.param_dtype)
        second = self.param("time_maa_w2", small_uniform, (5, rank, D), config.param_dtype)
        low = nn.tanh(checkpoint_name(config.product(shift(x_BTD, previous_BTD, mix["x"]), first), "low_rank"))
        low_5BTR = jnp.moveaxis(low.reshape(*low.shape[:2], 5, rank), 2, 0)
        moved = [config.product(low_BTR, matrix) for low_BTR, matrix in zip(low_5BTR, second, strict=True)]
        moved = [checkpoint_name(m_BTD, "low_rank") for m_BTD in moved]
        total = lambda letter, m_BTD: mix[letter][None, None].astype(x_BTD.dtype) + m_BTD
        shifted = lambda letter, m_BTD: x_BTD + (previous_BTD - x_BTD) * total(letter, m_BTD)
        return {letter: shifted(letter, m_BTD) for letter, m_BTD in zip(LETTERS, moved, strict=True)}


def small_uniform(key, shape, dtype):
    """Uniform in +-0.01; 16-bit parameters start as the float32 ones, rounded."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.random.uniform(key, shape, wide, -0.01, 0.01).astype(dtype)


def _channel_inputs(module, x_BTD, previous_BTD, layer):
    D, dtype = module.config.dim, module.config.param_dtype
    ramp = shift_ramp(D, depth_ratios(layer, module.config.num_layers)[1] ** 3)
    mix = {letter: vector(module, f"time_maa_{letter}", ramp, D, dtype) for letter in "kr"}
    return {letter: shift(x_BTD, previous_BTD, mix_D) for letter, mix_D in mix.items()}


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)). Token shift sees the normed input."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        att = TimeMix(self.config, name="att")
        ffn = ChannelMix(self.config, _channel_inputs, rwkv5.hidden_dim(self.config), name="ffn")
        return pre_norm(self, att, ffn, x_BTD, state, reset_BT, valid_BT, layer)


def low_ranks(config: BlockConfig) -> tuple[int, int]:
    """Widths of the low-rank maps of the mixes and of the decay: `config.low_ranks`, or 32 and 64.

    Released models from 7B on have twice these widths, which `SIZES` sets.
    """
    return given_ranks(config, (32, 64))


def flops(config: BlockConfig, seq_len: int) -> float:
    """Training FLOPs: those of RWKV-5, and 6 a weight of the low-rank maps."""
    mixes, decay = low_ranks(config)
    return rwkv5.flops(config, seq_len) + 6 * 2 * config.dim * (5 * mixes + decay)


SIZES = {  # released: World models by their size, and the one trained on the Pile
    "1.6b": rwkv5.WORLD | {"num_layers": 24, "dim": 2048},
    "3b": rwkv5.WORLD | {"num_layers": 32, "dim": 2560},
    "7b": rwkv5.WORLD | {"num_layers": 32, "dim": 4096, "low_ranks": (64, 128)},
    "14b": rwkv5.WORLD | {"num_layers": 61, "dim": 4096, "low_ranks": (64, 128)},
    "173m": {"vocab_size": 50304, "num_layers": 12, "dim": 768},
}

KIND = Kind(
    block=Block,
    init_state=heads.init_state,
    flops=flops,
    # at 64 and 128 the best of `python -m experiments.compare.run --sweep` for short byte-level runs
    learning_rates=((64, 8e-3), (128, 4e-3), *heads.RELEASED_RATES),
    recipe=heads.RECIPE,
    forms=FORMS,
    unseen=heads.unseen,
    low_ranks=low_ranks,
    recomputed={"outputs": 8.5, "block": 13},
    memory_traffic=174,
    groups=((r"/time_decay$", 2.0),),
    kept_wide=r"/time_(decay|faaaa)$",  # rounding them loses long memory
    observe=observed,
    tuned_start=heads.tuned_start,
    tuned_state=heads.tuned_state,
    to_rwkv=list,
    from_rwkv=heads.LayerState._make,
    fields={"embedding_init": "v5"},
    sizes=SIZES,
    formats=("pth", "rwkv.cpp"),
    released="RWKV-6",
)
