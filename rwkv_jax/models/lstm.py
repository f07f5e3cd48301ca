"""The LSTM baseline: pre-LN residual layers of one LSTM with an output projection each (LSTMP, Sak et al. 2014).

    i, f, g, o = W x_t + R h_{t-1} + b
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) tanh(c_t)

Equal in size to RWKV-4 up to rounding: 4 D F + 4 F^2 + F D = 13 D^2 gives F = 1.283 D. The bias of the forget gate
starts at 1 (Jozefowicz et al. 2015), the output projection at 0, as in the other models.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.models.attention import KIND as ATTENTION
from rwkv_jax.models.block import BlockConfig, Kind
from rwkv_jax.models.layers import batch_sharded, dropout, orthogonal


class LayerState(NamedTuple):
    """The past of a layer, float32 at least."""

    h_BF: jax.Array
    c_BF: jax.Array


def hidden_dim(config: BlockConfig) -> int:
    """F: the config's, or the one that gives a layer nearly 13 D^2 weights."""
    return config.hidden_dim or round(config.dim * (math.sqrt(233) - 5) / 8)


@partial(jax.jit, static_argnames="precision")
def lstm(x_BTG, recurrent_FG, state: LayerState, reset_BT=None, valid_BT=None, precision=None):
    """h [B, T, F] and the state after the last token, from the input's terms of the gates i, f, g, o.

    `x_BTG` and `recurrent_FG` hold the four side by side, G = 4 F. Products are in the dtype of `x_BTG`, gates and
    state in that of the state.
    """
    wide = state.c_BF.dtype
    recurrent_FG = recurrent_FG.astype(x_BTG.dtype)
    product = partial(jnp.matmul, precision=precision, preferred_element_type=wide)

    def step(old, inputs):
        x_BG, reset_B, valid_B = inputs
        h_BF, c_BF = old if reset_B is None else (jnp.where(reset_B[:, None], 0, x) for x in old)
        i, f, g, o = jnp.split(x_BG + product(h_BF.astype(x_BG.dtype), recurrent_FG), 4, axis=-1)
        c_BF = nn.sigmoid(f) * c_BF + nn.sigmoid(i) * nn.tanh(g)
        new = LayerState(nn.sigmoid(o) * nn.tanh(c_BF), c_BF)
        if valid_B is not None:
            new = jax.tree.map(lambda a, b: jnp.where(valid_B[:, None], a, b), new, old)
        return new, new.h_BF.astype(x_BG.dtype)

    by_time = jax.tree.map(lambda x: x.swapaxes(0, 1), (x_BTG, reset_BT, valid_BT))
    state, h_TBF = lax.scan(step, state, by_time)
    return h_TBF.swapaxes(0, 1), state


class Layer(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT):
        config, F, dtype = self.config, hidden_dim(self.config), self.config.param_dtype
        if state is None:
            state = init_state(config, len(x_BTD))
        forget_1 = lambda _: jnp.repeat(jnp.array([0, 1, 0, 0], dtype), F)
        gates = lambda key: jnp.concatenate([orthogonal()(k, (F, F), dtype) for k in jax.random.split(key, 4)], axis=1)
        bias_G = self.param("bias", forget_1).astype(x_BTD.dtype)
        recurrent_FG = self.param("recurrent_kernel", gates)
        x_BTG = checkpoint_name(config.linear(4 * F, kernel_init=orthogonal(), name="input")(x_BTD), "key")
        with jax.named_scope("lstm"):
            h_BTF, state = lstm(
                x_BTG + bias_G[None, None], recurrent_FG, state, reset_BT, valid_BT, config.matmul_precision
            )
        output = config.linear(config.dim, kernel_init=nn.initializers.zeros, name="output")
        return checkpoint_name(output(checkpoint_name(h_BTF, "mixed")), "att"), state


class Block(nn.Module):
    """x + LSTM(ln1(x))."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        recurrence, ln1 = Layer(self.config, name="lstm"), self.config.norm(name="ln1")
        x_BTD = batch_sharded(x_BTD)
        h_BTD, state = recurrence(ln1(x_BTD), state, reset_BT, valid_BT)
        return batch_sharded(dropout(self, x_BTD + h_BTD, self.config.dropout)), state


def init_state(config: BlockConfig, batch: int, max_length: int | None = None) -> LayerState:
    """The empty state, of one size whatever `max_length`."""
    zeros = lambda: jnp.zeros((batch, hidden_dim(config)), config.wide)
    return LayerState(zeros(), zeros())


def flops(config: BlockConfig, seq_len: int) -> float:
    """Training FLOPs: 6 a weight of a matrix product."""
    F = hidden_dim(config)
    return 6 * (5 * config.dim * F + 4 * F**2)


KIND = Kind(
    block=Block,
    init_state=init_state,
    flops=flops,
    learning_rates=ATTENTION.learning_rates,
    recomputed={"matmuls": 6.6, "outputs": 11.7, "block": 11.7},  # each reruns the recurrence
    decayed=r"kernel$",
    sizes=ATTENTION.sizes,
)
