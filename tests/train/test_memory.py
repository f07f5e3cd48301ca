"""Memory of a training step against the length of its windows."""

import jax
import numpy as np
import pytest

from rwkv_jax import models, train
from rwkv_jax.train import optim


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_memory_of_a_training_step_is_linear_in_its_length(kind):
    """8 times the tokens, 8 times the temporary arrays; one [T, T] array of float32 would make it 10 in RWKV-7."""
    model, tx = models.build(kind, vocab_size=64, num_layers=2, dim=64, head_size=32), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    step = jax.jit(train.make_step(model, tx), donate_argnums=0)

    def temporary(T):
        batch = {"tokens": jax.ShapeDtypeStruct((1, T + 1), np.int32), "mask": jax.ShapeDtypeStruct((1, T), bool)}
        lowered = step.lower(state, batch, jax.ShapeDtypeStruct((), np.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 8.4 * temporary(256)
