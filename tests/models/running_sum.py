"""A kind of layer for tests: a decayed running sum, whose first layer passes its input to all later ones.

h_t = W ln(x_t),    s_t = d s_{t-1} + h_t,    x_t + V (s_t + h_t of the first such layer)
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rwkv_jax.models.block import BlockConfig, Kind
from rwkv_jax.models.layers import batch_sharded, observe, vector


@dataclass(frozen=True)
class Variant:
    decayed: bool = True  # False: a plain sum


class LayerState(NamedTuple):
    sum_BD: jax.Array


@jax.jit
def running_sum(decay_D, h_BTD, sum_BD, reset_BT, valid_BT):
    def step(sum_BD, inputs):
        h_BD, reset_B1, valid_B1 = inputs
        new_BD = jnp.where(reset_B1, 0, decay_D[None] * sum_BD) + h_BD
        sum_BD = jnp.where(valid_B1, new_BD, sum_BD)
        return sum_BD, sum_BD

    mask = lambda given, default: jnp.full(h_BTD.shape[:2], default) if given is None else given
    masks = (mask(reset_BT, False)[..., None], mask(valid_BT, True)[..., None])
    sum_BD, sum_TBD = jax.lax.scan(step, sum_BD, jax.tree.map(lambda x: x.swapaxes(0, 1), (h_BTD, *masks)))
    return sum_TBD.swapaxes(0, 1), sum_BD


class Block(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer, first_BTD):
        config, D = self.config, self.config.dim
        x_BTD, state = batch_sharded(x_BTD), state or init_state(config, len(x_BTD))
        h_BTD = config.linear(D, name="input")(config.norm(name="ln")(x_BTD))
        observe(self, "h_max", lambda: jnp.abs(h_BTD).max())
        decay_D = vector(self, "sum_decay", lambda: jnp.linspace(0.1, 0.9, D), D, jnp.float32)
        decay_D = decay_D if config.variant.decayed else jnp.ones_like(decay_D)
        s_BTD, sum_BD = running_sum(decay_D, h_BTD.astype(config.wide), state.sum_BD, reset_BT, valid_BT)
        first_BTD = h_BTD if first_BTD is None else first_BTD
        o_BTD = config.linear(D, name="output")(s_BTD.astype(h_BTD.dtype) + first_BTD)
        return batch_sharded(x_BTD + o_BTD), LayerState(sum_BD), first_BTD


def init_state(config, batch, max_length=None):
    return LayerState(jnp.zeros((batch, config.dim), config.wide))


KIND = Kind(
    block=Block,
    init_state=init_state,
    flops=lambda config, seq_len: 6.0 * 2 * config.dim**2,
    learning_rates=((8, 1e-2), (512, 1e-3)),
    variant=Variant,
    shares_first=True,
    groups=((r"/sum_decay$", 0.5),),
    kept_wide=r"/sum_decay$",
    observe=lambda params, sown: {"h_max": sown["h_max"]},
    tuned_start=lambda config: {"sum": jnp.zeros(config.dim)},
    tuned_state=lambda tuned: LayerState(tuned["sum"]),
)
