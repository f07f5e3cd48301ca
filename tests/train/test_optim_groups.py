"""Rules of `optim.groups`: factors of leaves and layers, and freezing by a factor of 0."""

import re

import jax
import numpy as np
import pytest
import small

from rwkv_jax import models, train
from rwkv_jax.models import lora
from rwkv_jax.train import optim
from rwkv_jax.train.methods import Method


def _zeros(num_layers):
    """Parameters of a stack of that many layers, as NumPy arrays."""
    shapes = models.parameter_shapes(small.make("rwkv4", num_layers=num_layers))
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def test_factors_come_from_the_first_rule_that_matches_a_leaf_or_layer():
    params = _zeros(12)
    rules = [(r"^emb", 0), (r"blocks\.2-10/att", 0.5), (r"blocks.1/", 0.0), (r"ffn/", 3.0)]
    factors = optim.factors(params, rules)
    assert factors["emb"]["embedding"] == 0 and factors["head"]["kernel"] == 1
    att = factors["blocks"]["att"]["key"]["kernel"]
    assert att.shape == (12, 1, 1) and att.ravel().tolist() == [1, 0, *[0.5] * 9, 1]
    assert factors["blocks"]["ffn"]["key"]["kernel"].ravel().tolist() == [3, 0, *[3] * 10]
    layers = optim.factors(models.unstack(params), rules)
    assert [layers[f"blocks_{i}"]["att"]["key"]["kernel"] for i in range(12)] == att.ravel().tolist()
    assert optim.factors(params, optim.released_groups())["blocks"]["att"]["time_first"] == 3.0


def test_factors_number_layers_alike_when_the_first_is_stored_separately():
    """The first layer of RWKV-7, which passes its values up, is `blocks_0` in both layouts."""
    model = small.make("rwkv7", num_layers=4)
    shapes = [models.parameter_shapes(model), models.parameter_shapes(model.clone(scan=False))]
    stacked, apart = (jax.tree.map(lambda x: np.zeros(x.shape, np.float32), its) for its in shapes)
    rules = ((r"blocks\.0-1/att", 0.0), (r"blocks\.3/", 0.5))
    optim.check_groups(stacked, rules)
    of_layers = [optim.factors(apart, rules)[f"blocks_{i}"]["att"]["key"]["kernel"] for i in range(4)]
    found = optim.factors(stacked, rules)
    assert of_layers == [0, 0, 1, 0.5]
    assert [found["blocks_0"]["att"]["key"]["kernel"], *found["blocks"]["att"]["key"]["kernel"].ravel()] == of_layers
    for params in (stacked, apart):  # a rule for all layers includes the first
        rules = ((r"^blocks_0/ffn", 3.0), (r"^blocks/(att|ffn)/key", 0.0))
        optim.check_groups(params, rules)
        found = optim.factors(params, rules)
        keys = {name: [x[part]["key"]["kernel"] for part in ("att", "ffn")] for name, x in found.items() if "att" in x}
        assert keys.pop("blocks_0") == [0.0, 3.0]
        assert keys and all(factor == [0.0, 0.0] for factor in keys.values())
    adapters = lora.init(jax.random.key(0), stacked, 2, "^blocks/att/key")
    assert adapters.keys() == {"blocks_0", "blocks"}


def test_optimiser_keeps_frozen_leaves_without_decay_or_moments():
    one = lambda *shape: np.ones(shape, np.float32)
    params = {"emb": {"embedding": one(3, 2)}, "blocks": {"att": {"key": {"kernel": one(2, 2, 2)}}}}
    tx = optim.optimiser(weight_decay=0.1, groups=((r"^emb/", 0.0), (r"blocks.0/", 0.0)))

    @jax.jit
    def step(params):
        state = train.TrainState(0, params, tx.init(params), 0)
        return train.apply_gradient(tx, state, params, np.float32(1), np.float32(0.5))[0]

    after = step(params)
    moved = jax.tree.map(lambda x, y: np.asarray(x != y), after.params, params)
    assert not moved["emb"]["embedding"].any()
    assert moved["blocks"]["att"]["key"]["kernel"].all(axis=(1, 2)).tolist() == [False, True]
    assert sum(x.size for x in jax.tree.leaves(after.opt_state)) == 1 + 2 * 8


@pytest.mark.parametrize(
    ("kind", "decay"),
    [("rwkv7", "w0"), *(pytest.param(kind, "time_decay", marks=pytest.mark.slow) for kind in ("rwkv5", "rwkv6"))],
)
def test_step_keeps_frozen_paths_of_later_versions(kind, decay):
    model, params = small.drawn(small.make(kind, num_layers=3))
    groups = ((r"^emb/", 0.0), (r"blocks\.0-1/", 0.0), (rf"/{decay}$", 0.0), (r"/ffn/key/", 0.5))
    tx, zero, ids = optim.optimiser(weight_decay=0.1, groups=groups), np.zeros((), np.int32), small.tokens(2, 9)

    @jax.jit
    def step(params):
        state = train.TrainState(zero, params, tx.init(params), zero)
        batch = {"tokens": ids, "mask": np.ones((2, 8), bool)}
        return train.make_step(model, tx, method=Method(groups=groups))(state, batch, np.float32(1e-2))[0].params

    after = step(params)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), models.unstack(after), models.unstack(params))
    assert not any(jax.tree.leaves([moved["emb"], moved["blocks_0"], moved["blocks_1"]]))
    last = moved["blocks_2"]
    assert last["att"].pop(decay) is False
    assert all(jax.tree.leaves([last, moved["head"], moved["ln_out"]]))


def test_frozen_stopped_stops_gradients_of_frozen_leaves_and_layers():
    params = jax.tree.map(lambda x: x + 1, _zeros(3))
    total = lambda params, groups: sum(x.sum() for x in jax.tree.leaves(optim.frozen_stopped(params, groups)))
    grads = jax.jit(jax.grad(total), static_argnums=1)(params, ((r"^emb", 0.0), (r"blocks.1/", 0.0), (r"ffn/", 0.5)))
    expected = params | {"emb": _zeros(3)["emb"]}
    expected["blocks"] = jax.tree.map(
        lambda x: x * (np.arange(3) != 1).reshape(-1, *[1] * (x.ndim - 1)), params["blocks"]
    )
    jax.tree.map(np.testing.assert_array_equal, grads, expected)


@pytest.mark.parametrize("name", [name for name in small.KINDS if not name.startswith("hybrid")])
def test_released_groups_of_all_kinds_equal_those_of_each_kind_alone(name):
    """A parameter's name means the same in all kinds, as `models.block.Kind` demands."""
    model = small.make(name, token_shift=True) if name == "transformer" else small.make(name)
    ((_, own, _),) = model.unit
    tree = {"blocks": models.parameter_shapes(model)["blocks"]}
    for path in ("/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(tree)):
        matches = lambda field, kinds, path=path: any(
            re.search(getattr(kind, field), path) for kind in kinds if getattr(kind, field)
        )
        for field in ("decayed", "kept_wide"):
            assert matches(field, models.KINDS.values()) == matches(field, [own]), (field, path)
        first = lambda rules, path=path: next((factor for rule, factor in rules if re.search(rule, path)), 1.0)
        assert first(optim.released_groups()) == first(own.groups), path
