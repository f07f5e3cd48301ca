"""Training on generated sequences: the loop of the experiments whose data is a function of the step."""

from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from rwkv_jax import optim, train


def fit(model, batch_of: Callable[[int], dict], *, lr: float, steps: int, seed: int = 0, every: int = 0, look=None):
    """Train from the initialisers; (params, what `look` returned).

    Args:
        batch_of: step in [0, steps) -> {"tokens" [B, T + 1], "mask" [B, T]}, of one shape: T inputs, and which of the
            tokens that follow them count in the loss.
        lr: after a warm-up of 5 % of the steps, constant until the last tenth, which takes it to lr / 10.
        look: `look(step, params) -> (JSON value, whether to stop)`, called after each `every` steps and after the
            last; "step" counts the steps taken.
    """
    tx = optim.optimiser()
    init, step = jax.jit(train.make_init(model, tx)), jax.jit(train.make_step(model, tx), donate_argnums=0)
    rate = optim.schedule("exponential", lr, lr / 10, steps, steps // 20, steps - steps // 10)
    state, seen = init(jax.random.key(seed)), []
    for i in tqdm(range(steps), disable=None, leave=False):
        state, _ = step(state, batch_of(i), np.float32(rate(i)))
        if look and (i + 1 == steps or (every and (i + 1) % every == 0)):
            value, stop = look(i + 1, state.params)
            seen.append(value)
            if stop:
                break
    return state.params, seen
