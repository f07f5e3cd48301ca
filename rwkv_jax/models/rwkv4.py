"""RWKV-4 (arXiv:2305.13048), as the released code computes it; parameters carry the released names.

Where paper and code disagree, code wins: the non-zero matrices at the start are `att.value`, `ffn.key`, `head` and
the embedding (the paper's appendix E prints the opposite, with which channel mixing never gets a gradient), and
`time_mix_r` has its 0.5 in the exponent. A `Variant` is another model, one part of it changed.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models.layers import (
    ACTIVATIONS,
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
NOTHING = -1e30  # u of a current token that does not count: below any k and decay, above `ops.wkv4.EMPTY`


class LayerState(NamedTuple):
    """What a layer remembers of the past: 5 numbers a channel, whatever the length."""

    att_last: jax.Array | None  # [B, D] last input of time mixing, after ln1; None without token shift
    wkv: WKV4State
    ffn_last: jax.Array | None  # [B, D] last input of channel mixing, after ln2


class Variant(NamedTuple):
    """What of RWKV-4 can be exchanged, one part at a time; the defaults are the released model."""

    token_shift: bool = True  # False: r, k, v from the current token alone, no time_mix_*
    current_token: str = "bonus"  # in the average: "bonus", by a learned u; "plain", u is 0; "excluded"
    previous_token: str = "whole"  # in the average: "whole", decays begin after it; "decayed" once already
    receptance: bool = True  # False: both gates are 1/2, their value at the start, and 2 D^2 parameters fewer
    activation: str = "relu2"  # see `layers.ACTIVATIONS`
    matrix_init: str = "released"  # see `kernel_init`


def kernel_init(scheme: str, name: str):
    """Initialiser of a matrix, "att.value" for instance.

    "released"  att.value and ffn.key orthogonal, all others zero (RWKV-LM, RWKV-v4neo)
    "printed"   att.output and ffn.value normal with standard deviation 2, all others zero (appendix E): the hidden
                channels of channel mixing are zero, and their square has no slope there, so that none of its three
                matrices ever gets a gradient
    "normal"    all normal with standard deviation 0.02 (GPT-2)
    """
    if scheme == "normal":
        return nn.initializers.normal(0.02)
    if scheme == "printed":
        return nn.initializers.normal(2.0) if name in ("att.output", "ffn.value") else zeros
    return orthogonal() if name in ("att.value", "ffn.key") else zeros


class TimeMix(nn.Module):
    """o_t = W_o (sigmoid(r_t) * wkv_t), with r, k, v from the current and the previous token (Eqs. 11-17)."""

    dim: int
    num_layers: int
    linear: Callable
    wkv_impl: str | None
    variant: Variant = Variant()

    @nn.compact
    def __call__(self, x_BTD, last_BD, wkv_state, reset_BT, valid_BT, layer):
        D, variant = self.dim, self.variant
        up, down = depth_ratios(layer, self.num_layers)
        mix_dtype = self.linear.keywords["param_dtype"]
        decay_dtype = jnp.promote_types(mix_dtype, jnp.float32)  # a bf16 decay would round memory away
        ramps = {"k": mix_ramp(D, down), "v": mix_ramp(D, down, 0.3 * up), "r": mix_ramp(D, 0.5 * down)}
        mixed, last_BD = _mixed(self, ramps, mix_dtype, x_BTD, last_BD, reset_BT, valid_BT)
        decay = lambda: -5 + 8 * (jnp.arange(D) / max(D - 1, 1)) ** (0.7 + 1.3 * up)
        w_D = -jnp.exp(vector(self, "time_decay", decay, decay_dtype))
        u_D = self._bonus(lambda: jnp.log(0.3) + 0.5 * ((jnp.arange(D) + 1) % 3 - 1), w_D)

        matrix = lambda name: self.linear(D, kernel_init=kernel_init(variant.matrix_init, f"att.{name}"), name=name)
        k_BTD, v_BTD = matrix("key")(mixed["k"]), matrix("value")(mixed["v"])
        gate_BTD = 0.5
        if variant.receptance:
            gate_BTD = nn.sigmoid(checkpoint_name(matrix("receptance")(mixed["r"]), "receptance"))
        observe(self, "k_max", lambda: jnp.abs(k_BTD).max())
        wkv = lambda shared, rows: wkv4(*shared, *rows[:3], reset_BT=rows[3], valid_BT=rows[4], impl=self.wkv_impl)
        k_BTD, v_BTD = checkpoint_name(k_BTD, "key"), checkpoint_name(v_BTD, "value")
        rows = (k_BTD, v_BTD, wkv_state, reset_BT, valid_BT)
        with jax.named_scope("wkv"):
            y_BTD, wkv_state = on_own_rows(wkv)((w_D, u_D), rows)
        o_BTD = matrix("output")(gate_BTD * y_BTD)
        return checkpoint_name(o_BTD, "att"), last_BD, wkv_state

    def _bonus(self, start, w_D):
        """u of Eq. 16, which is all that tells apart what becomes of the newest two tokens.

        "excluded": the weight exp(u + k_t) is 0, unless nothing came before: a document's first token sees itself.
        "decayed" is the average over the past with weights exp((t-i) w + k_i). Numerator and denominator divided by
        exp(w), it is Eq. 16 with the bonus u - w.
        """
        if self.variant.current_token == "bonus":
            u_D = vector(self, "time_first", start, w_D.dtype)
        else:
            u_D = jnp.full_like(w_D, 0 if self.variant.current_token == "plain" else NOTHING)
        return u_D if self.variant.previous_token == "whole" else u_D - w_D


class ChannelMix(nn.Module):
    """o_t = sigmoid(r_t) * W_v max(k_t, 0)^2, with r, k from the current and the previous token (Eq. 18)."""

    dim: int
    hidden_dim: int
    num_layers: int
    linear: Callable
    variant: Variant = Variant()

    @nn.compact
    def __call__(self, x_BTD, last_BD, reset_BT, valid_BT, layer):
        D, F, variant = self.dim, self.hidden_dim, self.variant
        ramp = mix_ramp(D, depth_ratios(layer, self.num_layers)[1])
        mix_dtype = self.linear.keywords["param_dtype"]
        ramps = {"k": ramp, "r": ramp}
        mixed, last_BD = _mixed(self, ramps, mix_dtype, x_BTD, last_BD, reset_BT, valid_BT)

        matrix = lambda name, F: self.linear(F, kernel_init=kernel_init(variant.matrix_init, f"ffn.{name}"), name=name)
        k_BTF = checkpoint_name(matrix("key", F)(mixed["k"]), "ffn_key")
        observe(self, "active_F", lambda: (k_BTF > 0).any((0, 1)))
        gate_BTD = 0.5
        if variant.receptance:
            gate_BTD = nn.sigmoid(checkpoint_name(matrix("receptance", D)(mixed["r"]), "ffn_receptance"))
        v_BTD = matrix("value", D)(ACTIVATIONS[variant.activation](k_BTF))
        return gate_BTD * checkpoint_name(v_BTD, "ffn_value"), last_BD


def _mixed(module, ramps, dtype, x_BTD, last_BD, reset_BT, valid_BT):
    """(inputs of receptance, key and value by letter, last activations to carry): token shift, or none of it."""
    if not module.variant.receptance:
        ramps = {name: ramp for name, ramp in ramps.items() if name != "r"}
    if not module.variant.token_shift:
        return dict.fromkeys(ramps, x_BTD), last_BD
    mixes = {name: vector(module, f"time_mix_{name}", ramp, dtype) for name, ramp in ramps.items()}
    xx_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
    return {name: lerp(x_BTD, xx_BTD, mix_D) for name, mix_D in mixes.items()}, last_BD


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)). Token shift sees the normed input."""

    dim: int
    hidden_dim: int | None
    num_layers: int
    linear: Callable
    norm: Callable
    dropout: float
    wkv_impl: str | None
    variant: Variant = Variant()

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        att_last, wkv_state, ffn_last = state or (None, None, None)
        att = TimeMix(self.dim, self.num_layers, self.linear, self.wkv_impl, self.variant, name="att")
        hidden_dim = self.hidden_dim or 4 * self.dim
        ffn = ChannelMix(self.dim, hidden_dim, self.num_layers, self.linear, self.variant, name="ffn")
        x_BTD = batch_sharded(x_BTD)
        h_BTD, att_last, wkv_state = att(self.norm(name="ln1")(x_BTD), att_last, wkv_state, reset_BT, valid_BT, layer)
        x_BTD = dropout(self, x_BTD + h_BTD, self.dropout)
        h_BTD, ffn_last = ffn(self.norm(name="ln2")(x_BTD), ffn_last, reset_BT, valid_BT, layer)
        x_BTD = batch_sharded(dropout(self, x_BTD + h_BTD, self.dropout))
        return x_BTD, LayerState(att_last, wkv_state, ffn_last)


def init_state(batch: int, dim: int, dtype=jnp.float32, shift: bool = True) -> LayerState:
    """The empty past."""
    last = lambda: jnp.zeros((batch, dim), dtype) if shift else None
    return LayerState(last(), WKV4State.empty(batch, dim, dtype), last())
