"""Memory of a training step against the length of its windows."""

import jax
import numpy as np
import pytest

from rwkv_jax import models, train
from rwkv_jax.train import optim

LENGTHS = (256, 512, 1024, 2048)


def temporaries(kind):
    """Bytes of a step's temporary arrays at each length, as XLA plans them."""
    model, tx = models.build(kind, vocab_size=64, num_layers=2, dim=64, head_size=32), optim.optimiser()
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    step = jax.jit(train.make_step(model, tx), donate_argnums=0)

    def at(T):
        batch = {"tokens": jax.ShapeDtypeStruct((1, T + 1), np.int32), "mask": jax.ShapeDtypeStruct((1, T), bool)}
        lowered = step.lower(state, batch, jax.ShapeDtypeStruct((), np.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    return [at(T) for T in LENGTHS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5", "rwkv6"])
def test_training_step_takes_memory_linear_in_its_length(kind):
    """Each doubling of the length adds twice as much memory as the one before."""
    added = np.diff(temporaries(kind))
    assert added[0] > 0
    np.testing.assert_allclose(added[1:] / added[:-1], 2, rtol=0.03)


@pytest.mark.slow
def test_training_step_of_rwkv7_takes_no_memory_quadratic_in_its_length():
    """In XLA's plan 8 times the tokens take 8 times the memory; one [T, T] array of float32 would make it 10."""
    first, *_, last = temporaries("rwkv7")
    assert last < 8.4 * first
