"""Causal tracing (Meng et al., 2022) of a recurrent model: which part of a clean run repairs a corrupted one.

The embeddings of some tokens get noise. At one place, a token and a layer, the run then takes the values of a clean
run, and the effect is the probability of the answer that this restores. Two values leave a layer at a token:

    residual    the residual stream, which the layers above read at that token
    state       the layer's recurrent state, which the same layer reads at the next token
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rwkv_jax.models import rwkv4

KINDS = {"residual": (True, False), "state": (False, True), "both": (True, True)}  # (residual, state) restored


class Effects(NamedTuple):
    """Probabilities of one prompt's answer."""

    clean: jax.Array  # []
    corrupted: jax.Array  # [N] for each noise
    restored: jax.Array  # [N, kinds, T, L]


def read(model, params, prompt, noise_TD, clean=None, residual_TL=None, state_TL=None):
    """Read a prompt token by token; return (log p [V] of the next token, record).

    Args:
        model: unscanned, so that every layer is a module of its own.
        noise_TD: added to the embeddings.
        clean: the record of another reading.
        residual_TL, state_TL: where to replace the residual stream and the state by those of `clean`.

    Returns:
        The record holds the output of each layer, (x_11D, state), leaves [T, ...].
    """

    def token(state, now):
        token, valid, noise_D, clean, residual_L, state_L = now
        record = []

        def intervene(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if context.method_name != "__call__":
                return out
            if context.module.name == "emb":
                return out + noise_D[None, None].astype(out.dtype)
            if isinstance(context.module, rwkv4.Block):
                if clean is not None:
                    layer = len(record)
                    swap = lambda on, was, now: jax.tree.map(partial(jnp.where, on), was, now)
                    (x_was, state_was), (x, state) = clean[layer], out
                    out = swap(residual_L[layer], x_was, x), swap(state_L[layer], state_was, state)
                record.append(out)
            return out

        with nn.intercept_methods(intervene):
            x_11D, state = model.apply(
                {"params": params}, token[None, None], state, valid_BT=valid[None, None], method="hidden"
            )
        return state, (x_11D, tuple(record))

    by_token = (prompt.tokens_T, prompt.valid_T, noise_TD, clean, residual_TL, state_TL)
    _, (x_T11D, record) = jax.lax.scan(token, model.init_state(1), by_token)
    logits_11V = model.apply({"params": params}, x_T11D[-1], method="logits")
    return jax.nn.log_softmax(logits_11V[0, 0]), record


@partial(jax.jit, static_argnums=(0, 4))
def effects(model, params, prompt, noise_NTD, rows: int) -> Effects:
    """Return the answer's probabilities: clean, with noise, and with each place restored; `rows` runs at a time."""
    probability = lambda *args: jnp.exp(read(model, params, prompt, *args)[0][prompt.answer])
    log_p_V, clean = read(model, params, prompt, jnp.zeros_like(noise_NTD[0]))
    (N, T, _), L = noise_NTD.shape, model.num_layers
    kinds_K2 = jnp.array(list(KINDS.values()))
    places_PTL = jnp.eye(T * L, dtype=bool).reshape(T * L, T, L)

    def run(number):
        noise, kind, place = jnp.unravel_index(number, (N, len(KINDS), T * L))
        on_TL, (residual, state) = places_PTL[place], kinds_K2[kind]
        return probability(noise_NTD[noise], clean, on_TL & residual, on_TL & state)

    restored = jax.lax.map(run, jnp.arange(N * len(KINDS) * T * L), batch_size=rows)
    return Effects(
        jnp.exp(log_p_V[prompt.answer]),
        jax.lax.map(probability, noise_NTD),
        restored.reshape(N, len(KINDS), T, L),
    )


@partial(jax.jit, static_argnums=0)
def corrupted(model, params, prompt, noise_NTD):
    """Return the probabilities [N] of the answer, with nothing restored."""
    return jax.lax.map(lambda noise: jnp.exp(read(model, params, prompt, noise)[0][prompt.answer]), noise_NTD)
