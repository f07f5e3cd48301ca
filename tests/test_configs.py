"""Every config builds the model and the schedule that its header states."""

import jax
import jax.numpy as jnp
import pytest

from rwkv_jax import train
from rwkv_jax.models import kind_of, parameter_shapes
from rwkv_jax.train import optim, run_config

PARAMETERS = {
    "tiny.py": 923_648, "tiny.py:transformer": 920_064,
    "tiny.py:rwkv5": 925_184, "tiny.py:rwkv6": 1_155_584, "tiny.py:rwkv7": 1_017_728,
    "enwik8.py:rwkv4": 41_226_240, "enwik8.py:transformer": 41_183_232,
    "pile.py:169m": 169_342_464, "pile.py:430m": 430_397_440, "pile.py:1b5": 1_515_106_304,
    "pile.py:3b": 2_984_627_200, "pile.py:7b": 7_392_649_216, "pile.py:14b": 14_148_597_760,
    "pile.py:rwkv5-0.1b": 169_411_584, "pile.py:rwkv6-173m": 173_558_784,
    "pile.py:rwkv7-169m": 167_638_272, "pile.py:rwkv7-421m": 421_080_064, "pile.py:rwkv7-1b5": 1_465_014_272,
}  # fmt: skip
NAMES = {  # fields of the later versions
    f"{'pile' if its['vocab_size'] == 50304 else 'world'}.py:{name}-{size}": its
    for name in ("rwkv5", "rwkv6", "rwkv7")
    for size, its in kind_of(name).sizes.items()
}


def _parameters(config):
    model = run_config.model_of(config)
    shapes = parameter_shapes(model)
    lr = train.learning_rate(config, model)
    assert lr(0) > 0 and lr(config.steps - 1) < lr(config.steps // 50)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_config_has_the_size_of_its_header_and_a_schedule(name):
    config = run_config.read(f"configs/{name}")
    assert _parameters(config) == PARAMETERS[name]
    if name.startswith("pile"):
        assert config.steps * config.batch_size * config.seq_len == pytest.approx(332.1e9, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_config_of_a_later_version_has_the_released_recipe(name):
    config = run_config.read(f"configs/{name}")
    model, lr = run_config.model_of(config), train.learning_rate(config, run_config.model_of(config))
    assert {field: getattr(model, field) for field in NAMES[name]} == NAMES[name]
    assert (config.optim.betas, config.optim.eps, config.optim.clip) == ((0.9, 0.99), 1e-18, 1.0)
    assert config.optim.weight_decay == (0.001 if name.startswith(("world.py:rwkv5", "world.py:rwkv6")) else 0.1)
    assert lr(9) == config.optim.lr and lr(0) == pytest.approx(lr(9) / 10)
    assert lr(config.steps // 2) == pytest.approx((config.optim.lr + config.optim.lr_end) / 2, rel=1e-3)
    assert lr(config.steps - 1) == pytest.approx(config.optim.lr_end)
    assert 5e5 < config.batch_size * config.seq_len < 2.5e6


FAST = ("tiny.py:rwkv5", "pile.py:rwkv6-173m", "world.py:rwkv7-0.1b")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in FAST)]
)
def test_config_traces_its_first_step(name):
    config = run_config.read(f"configs/{name}")
    model, o = run_config.check(config, devices=config.batch_size), config.optim
    tx = optim.optimiser(tuple(o.betas), o.eps, o.weight_decay, o.clip, o.groups)
    state = jax.eval_shape(train.make_init(model, tx), jax.random.key(0))
    B, T = config.batch_size, config.seq_len
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32), "mask": jax.ShapeDtypeStruct((B, T), bool)}
    step = train.make_step(model, tx, l2wrap=o.l2wrap, loss_chunk=config.loss_chunk)
    after, values = jax.eval_shape(step, state, batch, jax.ShapeDtypeStruct((), jnp.float32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert values["loss_nats"].shape == ()


@pytest.mark.parametrize("size", ["14b", "rwkv7-169m", "tiny", "tiny-rwkv7"])
def test_extend_config_starts_each_stage_where_the_last_one_ended(size):
    tiny = size.startswith("tiny")
    last = run_config.read(f"configs/{f'extend.py:{size}-128' if tiny else f'pile.py:{size}'}")
    whole, pretraining = last.steps * last.batch_size * last.seq_len, None if tiny else last.seq_len
    stages = zip([256, 512, 1024] if tiny else [2048, 4096, 8192], [10, 100, 100], strict=True)
    for window, billions in ((window, billions) for window, billions in stages if window > last.seq_len):
        config = run_config.read(f"configs/extend.py:{size}-{window}")
        trunk = f"runs/{size if tiny else f'pile-{size}'}"
        trunk += "" if last.seq_len == pretraining else f"-{last.seq_len}"
        assert config.branch_from == f"{trunk}/checkpoints/{last.steps}"
        assert config.seq_len == window and config.model == last.model
        tokens = (config.steps - last.steps) * config.batch_size * window
        assert tokens == pytest.approx(billions * (whole / 332.1 if tiny else 1e9), rel=0.01)
        model = run_config.model_of(config)
        lr = train.learning_rate(config, model)
        before = train.learning_rate(last, model)
        assert lr(config.steps - 1) == lr(last.steps) == pytest.approx(before(last.steps - 1))
        last = config


@pytest.mark.parametrize(
    "name, expected",
    [
        ("extend.py:14b-1000", "stage is '14b-1000', expected a size of"),
        ("extend.py:rwkv7-169m-4096", "stage is 'rwkv7-169m-4096', expected a size of .* then one of -8192$"),
        ("pile.py:rwkv7-170m", "unknown size 'rwkv7-170m', expected one of 169m, .*rwkv7-169m"),
        ("pile.py:rwkv8-169m", "unknown size 'rwkv8-169m', expected one of"),
        ("world.py:rwkv7-421m", "unknown size 'rwkv7-421m', expected one of rwkv5-0.1b, .*rwkv7-7.2b$"),
    ],
)
def test_config_refuses_an_unknown_size_or_length_in_one_line(name, expected):
    with pytest.raises(ValueError, match=expected):
        run_config.read(f"configs/{name}")
