"""The transformer baseline: pre-LN, rotary, GELU, zero-initialised output projections, no biases.

Equal in size to RWKV-4 by construction: attention 4 D^2 and an MLP of hidden width 4.5 D make 13 D^2 a layer, RWKV-4's
own count. Without `token_shift`, a comparison at small scale mostly measures RWKV's token shift.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
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
    observed,
    orthogonal,
    token_shift,
    vector,
)
from rwkv_jax.models.rwkv4 import RELEASED_RATES, SIZES
from rwkv_jax.ops.dispatch import HOPPER, cuda_capability, target_platform

zeros = nn.initializers.zeros

QUERY_BLOCK = 128  # queries whose scores exist at one time when there is no cache
AMPERE = 8.0  # compute capability
CACHE_BLOCK = 256  # cache slots read at one time, unless one token reads a cache that is more than half full


class KVCache(NamedTuple):
    """Keys and values of the tokens seen, S slots a row, filled from 0 to `length`."""

    k_BHSK: jax.Array
    v_BHSK: jax.Array
    length_B: jax.Array
    start_B: jax.Array  # first slot of the current document; earlier ones are masked


@dataclass(frozen=True)
class Variant:
    """Ablation switches."""

    token_shift: bool = False  # True: RWKV's token shift on q, k, v and the MLP's input
    activation: Activation = "gelu"  # of the MLP


class LayerState(NamedTuple):
    cache: KVCache
    att_last: jax.Array | None  # [B, D], only with token shift
    ffn_last: jax.Array | None


def rotate(x_BTHK, position_BT):
    """Rotary position embedding: channels i and i + K/2 turn by position * 10000^(-2i/K)."""
    half = x_BTHK.shape[-1] // 2
    angle = 10000.0 ** (-jnp.arange(half) / half)
    angle_BT1i = (position_BT[..., None].astype(jnp.float32) * angle[None, None])[:, :, None]
    sin, cos = jnp.sin(angle_BT1i), jnp.cos(angle_BT1i)
    a, b = jnp.split(_wide(x_BTHK), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


@partial(jax.jit, static_argnames="precision")
def causal_attention(q_BTHK, k_BTHK, v_BTHK, start_BT=None, valid_BT=None, precision=None):
    """Softmax attention of every token to the valid tokens from `start` to itself; no past.

    Inputs without masks that fit take cuDNN's fused kernel on CUDA (`jax.nn.dot_product_attention` does not choose it
    by itself). Otherwise each block of queries attends to the keys up to its end, and is recomputed in the backward
    pass: no [T, T] array exists in either pass, and the future half is not computed.
    """
    if q_BTHK.shape[1] == 0:
        return q_BTHK
    if start_BT is None and valid_BT is None and _fits_cudnn(q_BTHK):
        fused = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        here = partial(_attention_by_blocks, precision=precision)  # for arrays committed to the CPU
        return jax.lax.platform_dependent(q_BTHK, k_BTHK, v_BTHK, cpu=here, default=fused)
    return _attention_by_blocks(q_BTHK, k_BTHK, v_BTHK, start_BT, valid_BT, precision)


def _fits_cudnn(q_BTHK) -> bool:
    """Whether cuDNN has a fused kernel for these queries: 16 bits, Ampere or later, K a multiple of 8."""
    if target_platform() != "gpu" or q_BTHK.dtype.itemsize != 2 or cuda_capability() < AMPERE:
        return False
    K, widest = q_BTHK.shape[3], 256 if cuda_capability() >= HOPPER else 128
    return K % 8 == 0 and widest >= K


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores(q_BHTK, k_BHSK, precision):
    """q k^T [B, H, T, S], float32 at least; its cotangent is rounded to the dtype of q, as in `layers.matmul`."""
    wide = jnp.promote_types(q_BHTK.dtype, jnp.float32)
    return _product(q_BHTK, k_BHSK, precision, wide)


def _product(q_BHTK, k_BHSK, precision, dtype=None):
    return jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, precision=precision, preferred_element_type=dtype)


def _scores_forward(q_BHTK, k_BHSK, precision):
    return _scores(q_BHTK, k_BHSK, precision), (q_BHTK, k_BHSK)


def _scores_backward(precision, saved, d_BHTS):
    return jax.vjp(partial(_product, precision=precision), *saved)[1](d_BHTS.astype(saved[0].dtype))


_scores.defvjp(_scores_forward, _scores_backward)


def _attention_by_blocks(q_BTHK, k_BTHK, v_BTHK, start_BT=None, valid_BT=None, precision=None):
    T = q_BTHK.shape[1]
    q_BHTK, k_BHTK, v_BHTK = (rearrange(x, "b t h k -> b h t k") for x in (q_BTHK, k_BTHK, v_BTHK))
    scale = q_BHTK.shape[-1] ** -0.5

    # Keys are sliced and masks built inside, so that the backward pass saves the same three arrays for all blocks.
    @partial(jax.checkpoint, static_argnums=(5,))
    def block(q, k_BHTK, v_BHTK, start_BT, valid_BT, begin):
        end = begin + q.shape[2]
        k, v = k_BHTK[:, :, :end], v_BHTK[:, :, :end]
        queries, keys = jnp.arange(begin, end)[:, None], jnp.arange(end)[None]
        allowed = (keys <= queries)[None, None]
        if start_BT is not None:
            allowed = allowed & (keys[None] >= start_BT[:, begin:end, None])[:, None]
        if valid_BT is not None:
            allowed = allowed & valid_BT[:, None, None, :end]
        scores = _scores(q * scale, k, precision)
        weights = nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1).astype(v.dtype)
        return jnp.einsum("bhts,bhsk->bhtk", weights, v, precision=precision)

    out = [
        block(q_BHTK[:, :, begin : begin + QUERY_BLOCK], k_BHTK, v_BHTK, start_BT, valid_BT, begin)
        for begin in range(0, T, QUERY_BLOCK)
    ]
    return rearrange(jnp.concatenate(out, axis=2), "b h t k -> b t h k")


@partial(jax.jit, static_argnames="precision")
def cached_attention(q_BTHK, cache: KVCache, slot_BT, start_BT, precision=None):
    """Attention of tokens already written to `cache` at `slot` to the slots from `start` to their own.

    Blocks of slots are read in turn with a running softmax, and only as many as are filled: the cost of a decode
    step depends on the context, not on the capacity of the cache. A single token reads a cache that is more than
    half full at once: XLA copies every slice before the product, and by block a token takes 61 ms instead of 27
    (12 x 768, 8,192 slots, 2-core CPU). Not differentiable in reverse (dynamic trip count).
    """
    B, T, H, K = q_BTHK.shape
    S = cache.k_BHSK.shape[2]
    size = min(CACHE_BLOCK, S)
    q_BHTK = rearrange(q_BTHK, "b t h k -> b h t k")
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=wide)

    def attend(begin, k_BHSK, v_BHSK, carry):
        top_BHT, total_BHT, out_BHTK = carry
        slots = (begin + jnp.arange(k_BHSK.shape[2]))[None, None]
        seen = (slots <= slot_BT[..., None]) & (slots >= start_BT[..., None])
        scores = jnp.where(seen[:, None], product("bhtk,bhsk->bhts", q_BHTK, k_BHSK) * K**-0.5, -1e30)
        new_top = jnp.maximum(top_BHT, scores.max(-1))
        weights = jnp.where(seen[:, None], jnp.exp(scores - new_top[..., None]), 0)
        fade = jnp.exp(top_BHT - new_top)
        new_BHTK = product("bhts,bhsk->bhtk", weights.astype(v_BHSK.dtype), v_BHSK)
        return new_top, total_BHT * fade + weights.sum(-1), out_BHTK * fade[..., None] + new_BHTK

    def block(i, carry):
        k_BHSK, v_BHSK = (lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in (cache.k_BHSK, cache.v_BHSK))
        return attend(i * size, k_BHSK, v_BHSK, carry)

    start = jnp.full((B, H, T), -1e30, wide), jnp.zeros((B, H, T), wide), jnp.zeros((B, H, T, K), wide)
    filled = jnp.minimum((jnp.max(cache.length_B) + size - 1) // size, S // size)
    by_block = lambda: lax.fori_loop(0, filled, block, start)
    at_once = lambda: attend(0, cache.k_BHSK, cache.v_BHSK, start)
    _, total_BHT, out_BHTK = lax.cond(2 * filled > S // size, at_once, by_block) if T == 1 else by_block()
    # only a padding token can see nothing
    out_BHTK = out_BHTK / jnp.maximum(total_BHT, jnp.finfo(wide).tiny)[..., None]
    return rearrange(out_BHTK, "b h t k -> b t h k").astype(q_BTHK.dtype)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _document_start(before, reset_BT, position_BT):
    """Position where each token's document starts: that of the newest reset, or `before` where there is none."""
    return lax.cummax(jnp.where(reset_BT, position_BT, before), axis=1)


class Attention(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, cache, reset_BT, valid_BT, layer):
        config, D, K = self.config, self.config.dim, head_size(self.config)
        if D % K or K % 2:
            raise ValueError(f"dim is {D} and head_size {K}, expected an even head size that divides dim")
        inputs = [x_BTD] * 3
        if config.variant.token_shift:
            up, down = depth_ratios(layer, config.num_layers)
            previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
            ramps = (mix_ramp(D, 0.5 * down), mix_ramp(D, down), mix_ramp(D, down, 0.3 * up))
            mix = lambda name, ramp: vector(self, f"time_mix_{name}", ramp, D, config.param_dtype)
            inputs = [lerp(x_BTD, previous_BTD, mix(*named)) for named in zip("qkv", ramps, strict=True)]
        project = lambda name, x: checkpoint_name(config.linear(D, kernel_init=orthogonal(), name=name)(x), name)
        q, k, v = (
            rearrange(project(name, x), "b t (h k) -> b t h k", k=K)
            for name, x in zip(("query", "key", "value"), inputs, strict=True)
        )
        observe(self, "k_max", lambda: jnp.abs(k).max())
        precision = config.matmul_precision
        with jax.named_scope("attention"):
            if cache is None:
                y, cache = self._without_past(q, k, v, reset_BT, valid_BT, precision), None
            else:
                y, cache = self._after(cache, q, k, v, reset_BT, valid_BT, precision)
        y_BTD = checkpoint_name(rearrange(y, "b t h k -> b t (h k)"), "mixed")
        o_BTD = config.linear(D, kernel_init=zeros, name="output")(y_BTD)
        return checkpoint_name(o_BTD, "att"), last_BD, cache

    def _without_past(self, q, k, v, reset_BT, valid_BT, precision):
        B, T = q.shape[:2]
        time_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        position_BT = time_BT if valid_BT is None else jnp.cumsum(valid_BT, axis=1) - 1
        start_BT = None if reset_BT is None else _document_start(0, reset_BT, time_BT)
        q, k = rotate(q, position_BT), rotate(k, position_BT)
        return causal_attention(q, k, v, start_BT, valid_BT, precision)

    def _after(self, cache, q, k, v, reset_BT, valid_BT, precision):
        B, T = q.shape[:2]
        if T == 0:
            return q, cache
        ones_BT = jnp.ones((B, T), jnp.int32) if valid_BT is None else valid_BT.astype(jnp.int32)
        slot_BT = cache.length_B[:, None] + jnp.cumsum(ones_BT, axis=1) - 1
        start_BT = jnp.broadcast_to(cache.start_B[:, None], (B, T))
        if reset_BT is not None:
            start_BT = _document_start(start_BT, reset_BT, slot_BT)
        q, k = rotate(q, slot_BT), rotate(k, slot_BT)
        # padding goes to a slot past the end, which the scatter drops
        to_BT = slot_BT if valid_BT is None else jnp.where(valid_BT, slot_BT, cache.k_BHSK.shape[2])
        write = lambda cache_HSK, new_THK, to_T: cache_HSK.at[:, to_T].set(
            rearrange(new_THK, "t h k -> h t k").astype(cache_HSK.dtype), mode="drop"
        )
        cache = KVCache(
            jax.vmap(write)(cache.k_BHSK, k, to_BT),
            jax.vmap(write)(cache.v_BHSK, v, to_BT),
            cache.length_B + ones_BT.sum(axis=1, dtype=jnp.int32),
            start_BT[:, -1],
        )
        return cached_attention(q, cache, slot_BT, start_BT, precision), cache


class MLP(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, last_BD, reset_BT, valid_BT, layer):
        config, D = self.config, self.config.dim
        if config.variant.token_shift:
            previous_BTD, last_BD = token_shift(x_BTD, last_BD, reset_BT, valid_BT)
            ramp = mix_ramp(D, depth_ratios(layer, config.num_layers)[1])
            x_BTD = lerp(x_BTD, previous_BTD, vector(self, "time_mix_k", ramp, D, config.param_dtype))
        k_BTF = config.linear(hidden_dim(config), kernel_init=orthogonal(), name="key")(x_BTD)
        k_BTF = checkpoint_name(k_BTF, "ffn_key")
        observe(self, "active_F", lambda: (k_BTF > 0).any((0, 1)))
        o_BTD = config.linear(D, kernel_init=zeros, name="value")(ACTIVATIONS[config.variant.activation](k_BTF))
        return checkpoint_name(o_BTD, "ffn_value"), last_BD


class Block(nn.Module):
    """x + Attention(ln1(x)), then x + MLP(ln2(x))."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        cache, att_last, ffn_last = state or (None, None, None)
        att, ffn = Attention(self.config, name="att"), MLP(self.config, name="ffn")
        ln1, ln2 = self.config.norm(name="ln1"), self.config.norm(name="ln2")
        x_BTD = batch_sharded(x_BTD)
        h_BTD, att_last, cache = att(ln1(x_BTD), att_last, cache, reset_BT, valid_BT, layer)
        x_BTD = dropout(self, x_BTD + h_BTD, self.config.dropout)
        h_BTD, ffn_last = ffn(ln2(x_BTD), ffn_last, reset_BT, valid_BT, layer)
        x_BTD = batch_sharded(dropout(self, x_BTD + h_BTD, self.config.dropout))
        return x_BTD, None if state is None else LayerState(cache, att_last, ffn_last)


def hidden_dim(config: BlockConfig) -> int:
    return config.hidden_dim or 9 * config.dim // 2


def head_size(config: BlockConfig) -> int:
    """K; a model narrower than the head size of its config has one head."""
    return min(config.head_size, config.dim)


def init_state(config: BlockConfig, batch: int, max_length: int | None = None) -> LayerState:
    """Return an empty cache for `max_length` tokens; more than `CACHE_BLOCK` are rounded up to a multiple of it.

    Raises:
        ValueError: `max_length` is None.
    """
    if max_length is None:
        raise ValueError("an attention layer needs init_state(batch, max_length=...): its cache has a fixed size")
    K = head_size(config)
    size = CACHE_BLOCK * math.ceil(max_length / CACHE_BLOCK) if max_length > CACHE_BLOCK else max_length
    kv = lambda: jnp.zeros((batch, config.dim // K, size, K), config.dtype)
    count = lambda: jnp.zeros(batch, jnp.int32)
    last = lambda: jnp.zeros((batch, config.dim), config.wide) if config.variant.token_shift else None
    return LayerState(KVCache(kv(), kv(), count(), count()), last(), last())


def flops(config: BlockConfig, seq_len: int) -> float:
    """Training FLOPs: 6 a weight of a matrix product, and 6 D T for causal attention over T tokens."""
    D = config.dim
    return 6 * (4 * D**2 + 2 * D * hidden_dim(config)) + 6 * D * seq_len


KIND = Kind(
    block=Block,
    init_state=init_state,
    flops=flops,
    # below the released widths the best of `python -m experiments.compare.run --sweep` for short byte-level runs
    learning_rates=((64, 8e-3), (128, 2e-3), (256, 1e-3), *RELEASED_RATES),
    variant=Variant,
    cached=lambda state: (state.cache.start_B, state.cache.length_B),
    unseen=head_size,
    recomputed={"outputs": 7.5, "block": 8.5},  # no gradient needs the last product of a layer
    observe=observed,
    sizes=SIZES,  # transformers of the released models' sizes
)
