"""Training on generated sequences: the training loop of experiments whose data is a function of the step."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rwkv_jax import train
from rwkv_jax.train import optim
from rwkv_jax.train.step import targets_of


def fit(
    model,
    batch_of: Callable[[int], dict],
    *,
    lr: float | Sequence[float],
    steps: int,
    seed: int = 0,
    every: int = 0,
    look=None,
    params=None,
):
    """Train from the initialisers, or from `params`; return (params, list of what `look` returned).

    Args:
        batch_of: step in [0, steps) -> {"tokens" [B, T + 1], "mask" [B, T]}: T inputs, and a mask of the tokens that
            follow them and count in the loss. With "targets" [B, T] these labels count instead. Each new shape
            compiles.
        lr: after a warm-up of 5 % of the steps, constant until the last tenth, which decays it to lr / 10. With
            several rates, each trains its own model on the same batches, all in one program: params have a leading
            axis.
        look: `look(step, params) -> (JSON value, whether to stop)`, called every `every` steps and after the last one;
            "step" counts the steps taken.
    """
    init, step = _programs(model, np.ndim(lr) > 0)
    share = optim.schedule("exponential", 1.0, 0.1, steps, steps // 20, steps - steps // 10)
    state, seen = init(jnp.broadcast_to(jax.random.key(seed), np.shape(lr))), []
    if params is not None:
        state = state.replace(params=jax.tree.map(jnp.copy, params))  # a step donates its state
    for i in tqdm(range(steps), disable=None, leave=False):
        state, _ = step(state, batch_of(i), np.asarray(lr, np.float32) * np.float32(share(i)))
        if look and (i + 1 == steps or (every and (i + 1) % every == 0)):
            value, stop = look(i + 1, state.params)
            seen.append(value)
            if stop:
                break
    return state.params, seen


@cache
def _programs(model, several: bool):
    """Return the jitted init and step of a model, compiled once per shape of batches whatever the data and rate."""
    tx = optim.optimiser()
    init, step = train.make_init(model, tx), train.make_step(model, tx)
    if several:
        init, step = jax.vmap(init), jax.vmap(step, in_axes=(0, None, 0))
    return jax.jit(init), jax.jit(step, donate_argnums=0)


@partial(jax.jit, static_argnums=0)
def share_right(model, params, batch: dict):
    """Return the share of a batch's masked-in targets that the model predicts greedily."""
    logits_BTV, _ = model.apply({"params": params}, batch["tokens"][:, :-1])
    right_BT = logits_BTV.argmax(axis=-1) == targets_of(batch)
    return (right_BT & batch["mask"]).sum() / batch["mask"].sum()
