"""Speculative decoding (arXiv:2211.17192, 2302.01318): a small model guesses, the large one checks.

A round begins with a token that is already drawn. The draft reads it and guesses `num_draft` more, one by one; the
model reads them all in one pass, which costs little more than one token as long as reading the weights is what takes
the time. With p the distribution of the model's sampler and q the draft's, a guess x stays with probability
min(1, p(x) / q(x)); at the first that does not, the next token is drawn from max(p - q, 0), or from p if all stay.
Each token is then distributed as p, whatever the draft. Both states go back to the last token that stays.

Batch 1, 12 x 768 in float32 on 2 cores of an AMD EPYC, drafts of 2 x 128, temperature 1 (jax 0.10.2, 2026-11-24):
1.7 to 2.6 times as fast as plain decoding at V 256, 1.5 to 2.1 at V 50,277, where 0.70 to 0.83 of the guesses stay.
The large model was a trained 4 x 256 widened without changing its function; how far released models agree was not
measured. A pass over 5 tokens takes 1.4 times that over one, so a useless draft makes decoding slower.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.generate import sampling
from rwkv_jax.generate.context import Context, with_room
from rwkv_jax.generate.decode import as_prompts, prepare, read
from rwkv_jax.models import per_layer, rewind

ROUNDS = 8  # in one call of the compiled function, at most


def generate(model, params, prompt_ids, *, draft, **settings) -> list[int] | list[list[int]]:
    """`generate.generate` with the help of a smaller model: the same distribution, other draws.

    With temperature 0 the tokens are those of plain decoding, but for ties within rounding.

    Args:
        draft: (model, params) of the same vocabulary.
        num_draft: tokens guessed in a round, at least 1.
        settings: those of `generate.generate`. The sampler must be one of `sampling.sampler`.
    """
    return generate_with_context(model, params, prompt_ids, draft=draft, **settings)[0]


def generate_with_context(
    model, params, prompt_ids, *, draft, num_draft: int = 4, context: Context | None = None, **settings
) -> tuple[list, Context]:
    """`generate`, and the context that has read the prompts and exactly its result. The draft reads prompts only."""
    models, params = zip(*(per_layer(*each) for each in ((model, params), draft)), strict=True)
    if models[0].vocab_size != models[1].vocab_size:
        sizes = [m.vocab_size for m in models]
        raise ValueError(f"the draft has a vocabulary of {sizes[1]}, expected the model's {sizes[0]}")
    if num_draft < 1:
        raise ValueError(f"num_draft is {num_draft}, expected at least 1")
    prompts, single = as_prompts(prompt_ids, models[0].vocab_size, context)
    start = prepare(models[0], params[0], prompts, context=context, **settings)()
    contexts = (start.context, read(models[1], params[1], [row if len(row) else [0] for row in prompts]))
    next_B = _first(
        start.sampler, start.context.logits_BV, start.key_B, start.index_B.astype(np.uint32), start.history
    )
    history, index_B, left_B = start.history, start.index_B, start.left_B
    tokens, room = [[] for _ in prompts], ROUNDS * (num_draft + 1)
    while left_B.any():
        contexts = [with_room(m, c, room, max(room, int(left_B.max()))) for m, c in zip(models, contexts, strict=True)]
        numbers = (index_B.astype(np.uint32), np.minimum(left_B, 2**30).astype(np.int32))
        drawn = (start.sampler, start.stop_V, start.key_B, *numbers)
        contexts, history, next_B, tokens_BT, count_B, stopped_B = _rounds(
            models, num_draft, params, tuple(contexts), history, next_B, *drawn
        )
        tokens_BT, count_B = np.asarray(tokens_BT), np.asarray(count_B)
        for row, more, count in zip(tokens, tokens_BT, count_B, strict=True):
            row += more[:count].tolist()
        index_B, left_B = index_B + count_B, np.where(stopped_B, 0, left_B - count_B)
        for b in np.flatnonzero((left_B > 0) & (np.asarray(next_B) < 0)):
            raise ValueError(f"row {b} has no token to draw: all are banned, or its logits are not finite")
    return (tokens[0] if single else tokens), contexts[0]


@jax.jit
def _first(sampler, logits_BV, key_B, index_B, history):
    return sampler(logits_BV, _keys(key_B, index_B), history)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _rounds(models, num_draft, params, contexts, history, next_B, sampler, stop_V, key_B, index_B, left_B):
    """At most `ROUNDS` rounds: (contexts, history, next token [B], new tokens, their number [B], stopped [B])."""
    B, T = len(next_B), num_draft + 1
    distribution = partial(sampling.distribution, sampler)

    def going(carry):
        i, (_, _, next_B, _, count_B, stopped_B) = carry
        return (i < ROUNDS) & (~stopped_B & (count_B < left_B) & (next_B >= 0)).any()

    def one_round(carry):
        i, (contexts, history, next_B, tokens_BT, count_B, stopped_B) = carry
        model_context, draft_context = contexts

        def guess(carry, t):
            state, history, token_B = carry
            logits_B1V, state, made = rewind.read(models[1], params[1], token_B[:, None], state)
            history = history.add(token_B)
            q_BV = distribution(logits_B1V[:, 0], history)
            guess_B = sampling.draw(q_BV, _keys(key_B, index_B + count_B + t + 1, 1))
            return (state, history, jnp.maximum(guess_B, 0)), (token_B, history, q_BV, made)

        begin = (draft_context.state, history, jnp.maximum(next_B, 0))
        (draft_after, *_), (read_TB, histories, q_TBV, draft_made) = lax.scan(
            guess, begin, jnp.arange(T, dtype=jnp.uint32)
        )
        logits_BTV, after, made = rewind.read(models[0], params[0], read_TB.T, model_context.state)
        p_TBV = jax.vmap(distribution)(jnp.moveaxis(logits_BTV, 1, 0), histories)

        p_TBV, q_TBV = jax.nn.softmax(p_TBV), jnp.nan_to_num(jax.nn.softmax(q_TBV))
        of_guess = lambda p_TBV: jnp.take_along_axis(p_TBV[:-1], read_TB[1:, :, None], axis=2)[..., 0]
        place_B = index_B + count_B
        guess_keys = jax.vmap(lambda t: _keys(key_B, place_B + t, 2))(jnp.arange(1, T, dtype=jnp.uint32))
        u_TB = jax.vmap(jax.vmap(jax.random.uniform))(guess_keys)
        stays_TB = u_TB * of_guess(q_TBV) < of_guess(p_TBV)
        n_B = jnp.cumprod(stays_TB, axis=0).sum(axis=0)  # guesses that stay
        of_row = lambda x_TB: x_TB[n_B, jnp.arange(B)]
        p_BV, q_BV = of_row(p_TBV), of_row(q_TBV.at[-1].set(0))
        rest_BV = jnp.maximum(p_BV - q_BV, 0)
        rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
        drawn_B = sampling.draw(jnp.log(rest_BV), _keys(key_B, place_B + n_B.astype(jnp.uint32) + 1))

        # a row ends before its first stop token and at its limit
        going_B = ~stopped_B & (next_B >= 0)
        new_B = jnp.where(going_B, jnp.minimum(n_B + 1, left_B - count_B), 0)
        before_stop_B = jnp.cumprod(~stop_V[read_TB], axis=0).sum(axis=0)
        stopped_B |= before_stop_B < new_B
        new_B = jnp.minimum(new_B, before_stop_B)
        draft_made = jax.tree.map(lambda x_TB1D: jnp.moveaxis(x_TB1D[:, :, 0], 0, 1), draft_made)
        last_BV = jnp.take_along_axis(logits_BTV, jnp.maximum(new_B - 1, 0)[:, None, None], axis=1)[:, 0]
        model_context = Context(
            rewind.state_after(models[0], params[0], model_context.state, after, made, new_B),
            jnp.where((new_B > 0)[:, None], last_BV, model_context.logits_BV),
        )
        draft_context = Context(
            rewind.state_after(models[1], params[1], draft_context.state, draft_after, draft_made, new_B),
            draft_context.logits_BV,
        )
        places_BT = count_B[:, None] + jnp.arange(T)[None]
        tokens_BT = tokens_BT.at[jnp.arange(B)[:, None], places_BT].set(read_TB.T, mode="drop")
        next_B = jnp.where(going_B, drawn_B, next_B)
        history = jax.tree.map(of_row, histories)
        return i + 1, ((model_context, draft_context), history, next_B, tokens_BT, count_B + new_B, stopped_B)

    nothing = (jnp.zeros((B, ROUNDS * T), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    return lax.while_loop(going, one_round, (0, (contexts, history, next_B, *nothing)))[1]


def _keys(key_B, index_B, use=0):
    """Keys [B] of the tokens at `index_B`. use: 0 the model's draw, as without a draft; 1 a guess; 2 its test."""
    key_B = jax.vmap(jax.random.fold_in)(key_B, index_B)
    return key_B if use == 0 else jax.vmap(jax.random.fold_in, (0, None))(key_B, use)
