"""Every config builds the model and the schedule that its header names."""

import jax
import numpy as np
import pytest

from rwkv_jax import train
from rwkv_jax.train import run_config

PARAMETERS = {
    "tiny.py": 923_648, "tiny.py:transformer": 920_064,
    "enwik8.py:rwkv4": 41_226_240, "enwik8.py:transformer": 41_183_232,
    "pile.py:169m": 169_342_464, "pile.py:430m": 430_397_440, "pile.py:1b5": 1_515_106_304,
    "pile.py:3b": 2_984_627_200, "pile.py:7b": 7_392_649_216, "pile.py:14b": 14_148_597_760,
}  # fmt: skip


def _parameters(config):
    model = run_config.model_of(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    lr = train.learning_rate(config, model)
    assert lr(0) > 0 and lr(config.steps - 1) < lr(config.steps // 50)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_config_has_the_size_of_its_header_and_a_schedule(name):
    config = run_config.read(f"configs/{name}")
    assert _parameters(config) == PARAMETERS[name]
    if name.startswith("pile"):
        assert config.steps * config.batch_size * config.seq_len == pytest.approx(332.08e9, rel=1e-4)


@pytest.mark.parametrize("size", ["14b", "tiny"])
def test_extend_config_starts_each_stage_where_the_last_one_ended(size):
    windows = [128, 256, 512, 1024] if size == "tiny" else [1024, 2048, 4096, 8192]
    first = "extend.py:tiny-128" if size == "tiny" else f"pile.py:{size}"
    last = run_config.read(f"configs/{first}")
    whole = last.steps * last.batch_size * last.seq_len
    for window, billions in zip(windows[1:], [10, 100, 100], strict=True):
        config = run_config.read(f"configs/extend.py:{size}-{window}")
        trunk = f"runs/{'tiny' if size == 'tiny' else f'pile-{size}'}-{last.seq_len}".removesuffix("-1024")
        assert config.branch_from == f"{trunk}/checkpoints/{last.steps}"
        assert config.seq_len == window and config.model == last.model
        tokens = (config.steps - last.steps) * config.batch_size * window
        assert tokens == pytest.approx(billions * (1e9 if size != "tiny" else whole / 332.1), rel=0.01)
        model = run_config.model_of(config)
        lr = train.learning_rate(config, model)
        before = train.learning_rate(last, model)
        assert lr(config.steps - 1) == lr(last.steps) == pytest.approx(before(last.steps - 1))
        last = config


def test_extend_config_of_an_unknown_length_is_one_line():
    with pytest.raises(ValueError, match="stage is '14b-1000', expected a size of"):
        run_config.read("configs/extend.py:14b-1000")
