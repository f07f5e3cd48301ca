"""RWKV-4 (arXiv:2305.13048), as the released code computes it; parameters carry the released names.

Where paper and code disagree, code wins: the non-zero matrices at the start are `att.value`, `ffn.key`, `head` and
the embedding (the paper's appendix E prints the opposite, with which channel mixing never gets a gradient), and
`time_mix_r` has its 0.5 in the exponent.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models.layers import (
    batch_sharded,
    depth_ratios,
    dropout,
    lerp,
    mix_ramp,
    observe,
    on_own_rows,
    orthogonal,
    token_shift,
    vector,
)
from rwkv_jax.ops import WKV4State, wkv4

zeros = nn.initializers.zeros


class LayerState(NamedTuple):
    """What a layer remembers of the past: 5 numbers a channel, whatever the length."""

    att_last: jax.Array  # [B, D] last input of time mixing, after ln1
    wkv: WKV4State
    ffn_last: jax.Array  # [B, D] last input of channel mixing, after ln2


class TimeMix(nn.Module):
    """o_t = W_o (sigmoid(r_t) * wkv_t), with r, k, v from the current and the previous token (Eqs. 11-17)."""

    dim: int
    num_layers: int
    linear: Callable
    wkv_impl: str | None

    @nn.compact
    def __call__(self, x_BTD, last_BD, wkv_state, reset_BT, valid_BT, layer):
        D = self.dim
        up, down = depth_ratios(layer, self.num_layers)
        mix_dtype = self.linear.keywords["param_dtype"]
        decay_dtype = jnp.promote_types(mix_dtype, jnp.float32)  # a bf16 decay would round memory away
        i_D = jnp.arange(D)
        mix_k = vector(self, "time_mix_k", mix_ramp(D, down), mix_dtype)
        mix_v = vector(self, "time_mix_v", mix_ramp(D, down) + 0.3 * up, mix_dtype)
        mix_r = vector(self, "time_mix_r", mix_ramp(D, 0.5 * down), mix_dtype)
        time_decay = vector(self, "time_decay", -5 + 8 * (i_D / max(D - 1, 1)) ** (0.7 + 1.3 * up), decay_dtype)
        time_first = vector(self, "time_first", jnp.log(0.3) + 0.5 * ((i_D + 1) % 3 - 1), decay_dtype)

        xx_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        k_BTD = self.linear(D, kernel_init=zeros, name="key")(lerp(x_BTD, xx_BTD, mix_k))
        v_BTD = self.linear(D, kernel_init=orthogonal(), name="value")(lerp(x_BTD, xx_BTD, mix_v))
        r_BTD = self.linear(D, kernel_init=zeros, name="receptance")(lerp(x_BTD, xx_BTD, mix_r))
        observe(self, "k_max", lambda: jnp.abs(k_BTD).max())
        wkv = lambda shared, rows: wkv4(*shared, *rows[:3], reset_BT=rows[3], valid_BT=rows[4], impl=self.wkv_impl)
        k_BTD, v_BTD, r_BTD = (
            checkpoint_name(x, name) for x, name in ((k_BTD, "key"), (v_BTD, "value"), (r_BTD, "receptance"))
        )
        rows = (k_BTD, v_BTD, wkv_state, reset_BT, valid_BT)
        with jax.named_scope("wkv"):
            y_BTD, wkv_state = on_own_rows(wkv)((-jnp.exp(time_decay), time_first), rows)
        o_BTD = self.linear(D, kernel_init=zeros, name="output")(nn.sigmoid(r_BTD) * y_BTD)
        return checkpoint_name(o_BTD, "att"), last_BD, wkv_state


class ChannelMix(nn.Module):
    """o_t = sigmoid(r_t) * W_v max(k_t, 0)^2, with r, k from the current and the previous token (Eq. 18)."""

    dim: int
    hidden_dim: int
    num_layers: int
    linear: Callable

    @nn.compact
    def __call__(self, x_BTD, last_BD, reset_BT, valid_BT, layer):
        D, F = self.dim, self.hidden_dim
        ramp_D = mix_ramp(D, depth_ratios(layer, self.num_layers)[1])
        mix_dtype = self.linear.keywords["param_dtype"]
        mix_k = vector(self, "time_mix_k", ramp_D, mix_dtype)
        mix_r = vector(self, "time_mix_r", ramp_D, mix_dtype)

        xx_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        k_BTF = self.linear(F, kernel_init=orthogonal(), name="key")(lerp(x_BTD, xx_BTD, mix_k))
        observe(self, "active_F", lambda: (k_BTF > 0).any((0, 1)))
        r_BTD = self.linear(D, kernel_init=zeros, name="receptance")(lerp(x_BTD, xx_BTD, mix_r))
        k_BTF, r_BTD = checkpoint_name(k_BTF, "ffn_key"), checkpoint_name(r_BTD, "ffn_receptance")
        v_BTD = self.linear(D, kernel_init=zeros, name="value")(jnp.square(nn.relu(k_BTF)))
        return nn.sigmoid(r_BTD) * checkpoint_name(v_BTD, "ffn_value"), last_BD


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)). Token shift sees the normed input."""

    dim: int
    hidden_dim: int | None
    num_layers: int
    linear: Callable
    norm: Callable
    dropout: float
    wkv_impl: str | None

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        att_last, wkv_state, ffn_last = state or (None, None, None)
        att = TimeMix(self.dim, self.num_layers, self.linear, self.wkv_impl, name="att")
        ffn = ChannelMix(self.dim, self.hidden_dim or 4 * self.dim, self.num_layers, self.linear, name="ffn")
        x_BTD = batch_sharded(x_BTD)
        h_BTD, att_last, wkv_state = att(self.norm(name="ln1")(x_BTD), att_last, wkv_state, reset_BT, valid_BT, layer)
        x_BTD = dropout(self, x_BTD + h_BTD, self.dropout)
        h_BTD, ffn_last = ffn(self.norm(name="ln2")(x_BTD), ffn_last, reset_BT, valid_BT, layer)
        x_BTD = batch_sharded(dropout(self, x_BTD + h_BTD, self.dropout))
        return x_BTD, LayerState(att_last, wkv_state, ffn_last)


def init_state(batch: int, dim: int, dtype=jnp.float32) -> LayerState:
    """The empty past."""
    last = lambda: jnp.zeros((batch, dim), dtype)
    return LayerState(last(), WKV4State.empty(batch, dim, dtype), last())
