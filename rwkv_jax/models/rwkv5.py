"""RWKV-5.2, "Eagle" (arXiv:2404.05892, sections 3 and 4.1), as the released code computes it, under released names.

Each head keeps a matrix of keys and values where RWKV-4 keeps one weighted average a channel. Keys and receptance are
used without exponential and sigmoid, and the output passes a norm of each head and a gate.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models import heads, rwkv4
from rwkv_jax.models.block import BlockConfig, Kind
from rwkv_jax.models.heads import ChannelMix, HeadNorm, head_shape, pre_norm, split_heads
from rwkv_jax.models.layers import (
    depth_ratios,
    lerp,
    mix_ramp,
    observe,
    on_own_rows,
    orthogonal,
    token_shift,
    vector,
)
from rwkv_jax.ops.wkv6 import FORMS, RULES, wkv6

zeros = nn.initializers.zeros


class TimeMix(nn.Module):
    """o_t = W_o (norm(wkv_t) * silu(g_t)), with r, k, v, g from the current and the previous token."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, state, reset_BT, valid_BT, layer):
        config, D = self.config, self.config.dim
        up, down = depth_ratios(layer, config.num_layers)
        ramps = {"k": mix_ramp(D, down), "v": mix_ramp(D, down, 0.3 * up)}
        ramps |= {"r": mix_ramp(D, 0.5 * down), "g": mix_ramp(D, 0.5 * down)}
        previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        inputs = _mixed(self, ramps, x_BTD, previous_BTD)

        decay = lambda: heads.decay_init(D, up)().reshape(head_shape(config))
        w_HK = -jnp.exp(vector(self, "time_decay", decay, head_shape(config), config.wide_param)).astype(config.wide)
        bonus = vector(self, "time_faaaa", heads.bonus_init(config, up), head_shape(config), config.wide_param)
        u_HK = bonus.astype(config.wide)
        r_BTHK, k_BTHK, v_BTHV, gate_BTD = projections(self, inputs)
        wkv = lambda shared, rows: wkv6(
            rows[0], shared[0], *rows[1:3], shared[1], rows[3], reset_BT=rows[4], valid_BT=rows[5], impl=config.impl
        )
        with jax.named_scope("wkv"):
            y_BTHV, state = on_own_rows(wkv)((w_HK, u_HK), (r_BTHK, k_BTHK, v_BTHV, state, reset_BT, valid_BT))
        return output(self, y_BTHV, gate_BTD, layer), last_BD, state


def projections(module, inputs):
    """(r, k, v by heads, the gate) of RWKV-5 and 6."""
    D, config = module.config.dim, module.config
    gains = {"receptance": 1.0, "key": 0.1, "value": 1.0, "gate": 0.1}
    matrix = lambda name: config.linear(D, kernel_init=orthogonal(gains[name]), name=name)(inputs[name[0]])
    r, k, v, g = (checkpoint_name(matrix(name), name) for name in ("receptance", "key", "value", "gate"))
    observe(module, "k_max", lambda: jnp.abs(k).max())
    return *(split_heads(x, config) for x in (r, k, v)), nn.silu(g)


def output(module, y_BTHV, gate_BTD, layer):
    """W_o (norm(y) * gate)."""
    normed_BTD = HeadNorm(module.config, name="ln_x")(y_BTHV, layer)
    matrix = module.config.linear(module.config.dim, kernel_init=zeros, name="output")
    return checkpoint_name(matrix(normed_BTD * gate_BTD), "att")


def _mixed(module, ramps, x_BTD, previous_BTD):
    D, dtype = module.config.dim, module.config.param_dtype
    mix = {letter: vector(module, f"time_mix_{letter}", ramp, D, dtype) for letter, ramp in ramps.items()}
    return {letter: lerp(x_BTD, previous_BTD, mix_D) for letter, mix_D in mix.items()}


def _channel_inputs(module, x_BTD, previous_BTD, layer):
    ramp = mix_ramp(module.config.dim, depth_ratios(layer, module.config.num_layers)[1])
    return _mixed(module, {"k": ramp, "r": ramp}, x_BTD, previous_BTD)


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)). Token shift sees the normed input."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        att = TimeMix(self.config, name="att")
        ffn = ChannelMix(self.config, _channel_inputs, hidden_dim(self.config), name="ffn")
        return pre_norm(self, att, ffn, x_BTD, state, reset_BT, valid_BT, layer)


def hidden_dim(config: BlockConfig) -> int:
    """F: 3.5 D rounded down to a multiple of 32, at least 32."""
    return config.hidden_dim or max(32, int(3.5 * config.dim) // 32 * 32)


def flops(config: BlockConfig, seq_len: int) -> float:
    """Training FLOPs: 6 a weight of a matrix product, and 3 times WKV's forward products in chunks of C tokens,
    4 K V + 3 C V a head."""
    D, K, C = config.dim, head_shape(config)[1], RULES["chunked"].chunk
    return 6 * (6 * D**2 + 2 * D * hidden_dim(config)) + 3 * D * (4 * K + 3 * C)


WORLD = {"vocab_size": 65536}
SIZES = {  # the released World models
    "0.1b": WORLD | {"num_layers": 12, "dim": 768},
    "0.4b": WORLD | {"num_layers": 24, "dim": 1024},
    "1.5b": WORLD | {"num_layers": 24, "dim": 2048},
    "3b": WORLD | {"num_layers": 32, "dim": 2560},
    "7b": WORLD | {"num_layers": 32, "dim": 4096},
}

KIND = Kind(
    block=Block,
    init_state=heads.init_state,
    flops=flops,
    # at 64 and 128 the best of `python -m experiments.compare.run --sweep` for short byte-level runs
    learning_rates=((64, 8e-3), (128, 8e-3), *heads.RELEASED_RATES),
    recipe=heads.RECIPE,
    forms=FORMS,
    unseen=heads.unseen,
    recomputed={"outputs": 8.5, "block": 13},
    memory_traffic=126,
    groups=((r"/time_decay$", 2.0),),
    kept_wide=r"/time_(decay|faaaa)$",  # rounding them loses long memory
    observe=rwkv4.observed,
    tuned_start=heads.tuned_start,
    tuned_state=heads.tuned_state,
    to_rwkv=list,
    from_rwkv=heads.LayerState._make,
    fields={"embedding_init": "v5"},
    sizes=SIZES,
    formats=("pth", "rwkv.cpp"),
    released="RWKV-5.2",
)
