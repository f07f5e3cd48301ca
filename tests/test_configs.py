"""Every config builds the model and the schedule that its header names."""

import jax
import numpy as np
import pytest

from rwkv_jax import models, run_config, train

CONFIGS = ["tiny.py", "tiny.py:transformer", "enwik8.py:rwkv4", "enwik8.py:transformer"]
PILE = {"169m": 169_342_464, "430m": 430_397_440, "1b5": 1_515_106_304, "3b": 2_984_627_200, "7b": 7_392_649_216,
        "14b": 14_148_597_760}  # fmt: skip


def _parameters(config):
    model = models.build(**{k: v for k, v in config.model.to_dict().items() if v is not None})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    lr = train.learning_rate(config, model)
    assert lr(0) > 0 and lr(config.steps - 1) < lr(config.steps // 50)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name):
    assert _parameters(run_config.read(f"configs/{name}")) > 0


@pytest.mark.parametrize("size", PILE)
def test_pile_has_the_papers_sizes_and_its_token_count(size):
    config = run_config.read(f"configs/pile.py:{size}")
    assert _parameters(config) == PILE[size]
    assert config.steps * config.batch_size * config.seq_len == pytest.approx(332.08e9, rel=1e-4)


def test_enwik8_is_the_papers_shape():
    assert _parameters(run_config.read("configs/enwik8.py")) == 41_226_240
