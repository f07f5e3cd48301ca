"""RWKV-4 (arXiv:2305.13048), as the released code computes it; parameters carry the released names.

Where paper and code disagree, code wins: the non-zero matrices at the start are `att.value`, `ffn.key`, `head` and
the embedding (the paper's appendix E prints the opposite, with which channel mixing never gets a gradient), and
`time_mix_r` has its 0.5 in the exponent.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models.block import BlockConfig, Kind
from rwkv_jax.models.layers import (
    ACTIVATIONS,
    Activation,
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
from rwkv_jax.ops.wkv4 import EMPTY, FORMS

zeros = nn.initializers.zeros
NOTHING = -1e30  # u of an excluded current token: below any k and decay, above `ops.wkv4_algebra.EMPTY`
FORGETS = 1e-3  # a channel that keeps less than this share of its past from one token to the next forgets at once


class LayerState(NamedTuple):
    """The past of a layer: 5 numbers a channel, whatever the length."""

    att_last: jax.Array | None  # [B, D] last input of time mixing, after ln1; None without token shift
    wkv: WKV4State
    ffn_last: jax.Array | None  # [B, D] last input of channel mixing, after ln2


@dataclass(frozen=True)
class Variant:
    """Ablation switches; the defaults are the released model."""

    token_shift: bool = True  # False: r, k, v from the current token alone, no time_mix_*
    shift_v: bool = True  # False: v of time mixing from the current token alone, no time_mix_v
    current_token: Literal["bonus", "plain", "excluded"] = "bonus"  # in the average: a learned u, u = 0, or absent
    previous_token: Literal["whole", "decayed"] = "whole"  # in the average: decays start after it, or with it
    receptance: bool = True  # False: both gates are 1/2, their initial value; 2 D^2 fewer parameters
    activation: Activation = "relu2"  # of the hidden channels of channel mixing
    matrix_init: Literal["released", "printed", "normal"] = "released"  # see `kernel_init`


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

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, wkv_state, reset_BT, valid_BT, layer):
        D, variant = self.config.dim, self.config.variant
        up, down = depth_ratios(layer, self.config.num_layers)
        ramps = {"k": mix_ramp(D, down), "v": mix_ramp(D, down, 0.3 * up), "r": mix_ramp(D, 0.5 * down)}
        unshifted = () if variant.shift_v else ("v",)
        inputs, last_BD = _shifted(self, ramps, unshifted, x_BTD, last_BD, reset_BT, valid_BT)
        decay = lambda: -5 + 8 * (jnp.arange(D) / max(D - 1, 1)) ** (0.7 + 1.3 * up)
        w_D = -jnp.exp(vector(self, "time_decay", decay, D, self.config.wide_param))
        u_D = self._bonus(lambda: jnp.log(0.3) + 0.5 * ((jnp.arange(D) + 1) % 3 - 1), w_D)

        init = lambda name: kernel_init(variant.matrix_init, f"att.{name}")
        matrix = lambda name: self.config.linear(D, kernel_init=init(name), name=name)
        k_BTD, v_BTD = matrix("key")(inputs["k"]), matrix("value")(inputs["v"])
        gate_BTD = 0.5
        if variant.receptance:
            gate_BTD = nn.sigmoid(checkpoint_name(matrix("receptance")(inputs["r"]), "receptance"))
        observe(self, "k_max", lambda: jnp.abs(k_BTD).max())
        wkv = lambda shared, rows: wkv4(*shared, *rows[:3], reset_BT=rows[3], valid_BT=rows[4], impl=self.config.impl)
        k_BTD, v_BTD = checkpoint_name(k_BTD, "key"), checkpoint_name(v_BTD, "value")
        rows = (k_BTD, v_BTD, wkv_state, reset_BT, valid_BT)
        with jax.named_scope("wkv"):
            y_BTD, wkv_state = on_own_rows(wkv)((w_D, u_D), rows)
        o_BTD = matrix("output")(gate_BTD * y_BTD)
        return checkpoint_name(o_BTD, "att"), last_BD, wkv_state

    def _bonus(self, start, w_D):
        """u of Eq. 16, which alone distinguishes the variants of the newest two tokens.

        "excluded": the weight exp(u + k_t) is 0, unless nothing came before: a document's first token sees itself.
        "decayed" is the average over the past with weights exp((t-i) w + k_i). Dividing numerator and denominator by
        exp(w) gives Eq. 16 with the bonus u - w.
        """
        variant = self.config.variant
        if variant.current_token == "bonus":
            u_D = vector(self, "time_first", start, self.config.dim, w_D.dtype)
        else:
            u_D = jnp.full_like(w_D, 0 if variant.current_token == "plain" else NOTHING)
        return u_D if variant.previous_token == "whole" else u_D - w_D


class ChannelMix(nn.Module):
    """o_t = sigmoid(r_t) * W_v max(k_t, 0)^2, with r, k from the current and the previous token (Eq. 18)."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, reset_BT, valid_BT, layer):
        D, variant = self.config.dim, self.config.variant
        ramp = mix_ramp(D, depth_ratios(layer, self.config.num_layers)[1])
        inputs, last_BD = _shifted(self, {"k": ramp, "r": ramp}, (), x_BTD, last_BD, reset_BT, valid_BT)

        init = lambda name: kernel_init(variant.matrix_init, f"ffn.{name}")
        matrix = lambda name, F: self.config.linear(F, kernel_init=init(name), name=name)
        k_BTF = checkpoint_name(matrix("key", hidden_dim(self.config))(inputs["k"]), "ffn_key")
        observe(self, "active_F", lambda: (k_BTF > 0).any((0, 1)))
        gate_BTD = 0.5
        if variant.receptance:
            gate_BTD = nn.sigmoid(checkpoint_name(matrix("receptance", D)(inputs["r"]), "ffn_receptance"))
        v_BTD = matrix("value", D)(ACTIVATIONS[variant.activation](k_BTF))
        return gate_BTD * checkpoint_name(v_BTD, "ffn_value"), last_BD


def _shifted(module, ramps, unshifted, x_BTD, last_BD, reset_BT, valid_BT):
    """(inputs of receptance, key and value by letter, last activations to carry), after token shift where it is on."""
    variant, dtype = module.config.variant, module.config.param_dtype
    inputs = {name: x_BTD for name in ramps if name != "r" or variant.receptance}
    if variant.token_shift:
        previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
        for name in (name for name in inputs if name not in unshifted):
            mix_D = vector(module, f"time_mix_{name}", ramps[name], module.config.dim, dtype)
            inputs[name] = lerp(x_BTD, previous_BTD, mix_D)
    return inputs, last_BD


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)). Token shift sees the normed input."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        att_last, wkv_state, ffn_last = state or (None, None, None)
        att, ffn = TimeMix(self.config, name="att"), ChannelMix(self.config, name="ffn")
        ln1, ln2 = self.config.norm(name="ln1"), self.config.norm(name="ln2")
        x_BTD = batch_sharded(x_BTD)
        h_BTD, att_last, wkv_state = att(ln1(x_BTD), att_last, wkv_state, reset_BT, valid_BT, layer)
        x_BTD = dropout(self, x_BTD + h_BTD, self.config.dropout)
        h_BTD, ffn_last = ffn(ln2(x_BTD), ffn_last, reset_BT, valid_BT, layer)
        x_BTD = batch_sharded(dropout(self, x_BTD + h_BTD, self.config.dropout))
        return x_BTD, LayerState(att_last, wkv_state, ffn_last)


def hidden_dim(config: BlockConfig) -> int:
    return config.hidden_dim or 4 * config.dim


def init_state(config: BlockConfig, batch: int, max_length: int | None = None) -> LayerState:
    """The empty state, of one size whatever `max_length`."""
    last = lambda: jnp.zeros((batch, config.dim), config.wide) if config.variant.token_shift else None
    return LayerState(last(), WKV4State.empty(batch, config.dim, config.wide), last())


def flops(config: BlockConfig, seq_len: int) -> float:
    """Training FLOPs: 6 a weight of a matrix product (Table 2 counts 13 D^2 forward) and 60 D for WKV, about 20 D of
    which are forward (0.1 % at D 512)."""
    D = config.dim
    return 6 * ((5 if config.variant.receptance else 3) * D**2 + 2 * D * hidden_dim(config)) + 60 * D


def observed(params, sown) -> dict:
    """Diagnostics of a layer whose decay is a parameter."""
    keeps = jnp.exp(-jnp.exp(params["att"]["time_decay"]))
    dead = {"forgetting": jnp.mean(keeps < FORGETS), "inactive": 1 - sown["ffn"]["active_F"].mean()}
    return {"k_max": sown["att"]["k_max"], "dead_channels": dead}


def tuned_start(config: BlockConfig) -> dict:
    """Initial values of state tuning, [D] each: nearly the empty state, whose gradient is zero.

    value and log_den: num / den and log den at log_scale 0, initially 0 and -5, so little that any token's exp(k)
    counts. att_last and ffn_last: the activations that token shift uses before the first token.
    """
    zeros_D = jnp.zeros(config.dim, config.wide)
    lasts = {"att_last": zeros_D, "ffn_last": zeros_D} if config.variant.token_shift else {}
    return lasts | {"value": zeros_D, "log_den": zeros_D - 5}


def tuned_state(tuned) -> LayerState:
    den_D = jnp.exp(tuned["log_den"])
    wkv = WKV4State(tuned["value"] * den_D, den_D, jnp.zeros_like(den_D))
    return LayerState(tuned.get("att_last"), wkv, tuned.get("ffn_last"))


def to_rwkv(state: LayerState) -> list[np.ndarray]:
    att_last, (num, den, log_scale), ffn_last = state
    return [att_last, num, den, _with_scale(num, den, log_scale, -1e30), ffn_last]


def from_rwkv(arrays) -> LayerState:
    att_last, num, den, log_scale, ffn_last = arrays
    return LayerState(att_last, WKV4State(num, den, _with_scale(num, den, log_scale, EMPTY)), ffn_last)


def _with_scale(num, den, log_scale, empty):
    """log_scale, set to `empty` where nothing has been read: any scale is valid there, and the package's differs."""
    return np.where((num == 0) & (den == 0), log_scale.dtype.type(empty), log_scale)


NEOX = {"vocab_size": 50277}  # that of the GPT-NeoX-20B tokenizer
SIZES = {  # the released models (Table 2)
    "169m": NEOX | {"num_layers": 12, "dim": 768},
    "430m": NEOX | {"num_layers": 24, "dim": 1024},
    "1b5": NEOX | {"num_layers": 24, "dim": 2048},
    "3b": NEOX | {"num_layers": 32, "dim": 2560},
    "7b": NEOX | {"num_layers": 32, "dim": 4096},
    "14b": NEOX | {"num_layers": 40, "dim": 5120},
}
RELEASED_RATES = ((768, 6e-4), (1024, 4e-4), (2048, 3e-4), (4096, 1.5e-4), (5120, 1e-4))  # (width, rate) of Table 3

KIND = Kind(
    block=Block,
    init_state=init_state,
    flops=flops,
    # below the released widths the best of `python -m experiments.compare.run --sweep` for short byte-level runs
    learning_rates=((64, 1.6e-2), (128, 8e-3), (256, 4e-3), *RELEASED_RATES),
    variant=Variant,
    forms=FORMS,
    recomputed={"outputs": 8, "block": 13},
    groups=((r"/time_decay$", 2.0), (r"/time_first$", 3.0)),  # RWKV-v4neo, `layerwise_lr=1`
    kept_wide=r"/time_(decay|first)$",  # rounding them loses long memory
    observe=observed,
    tuned_start=tuned_start,
    tuned_state=tuned_state,
    to_rwkv=to_rwkv,
    from_rwkv=from_rwkv,
    sizes=SIZES,
    formats=("pth", "huggingface", "rwkv.cpp"),
    released="RWKV-4",
    world_template="world",
)
