"""Diagnostics of the versions of RWKV against NumPy's values from parameters, updates and logits."""

import jax
import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict

from rwkv_jax import train
from rwkv_jax.models import rwkv4
from rwkv_jax.train import optim
from rwkv_jax.train.diagnostics import make_diagnose

B, T = 2, 8
DECAYS = {"rwkv4": ("time_decay", "time_first"), "rwkv7": ("w0",)} | dict.fromkeys(
    ("rwkv5", "rwkv6"), ("time_decay", "time_faaaa")
)
SLOW = ("rwkv5", "rwkv6")


def group_of(path, decays):
    if path[0] in ("emb", "head"):
        return {"emb": "embedding", "head": "head"}[path[0]]
    if any(part.startswith("ln") for part in path):
        return "norms"
    return "decays" if path[-1] in decays else {"att": "time_mix", "ffn": "channel_mix"}[path[1]]


def keys_of_the_first_layer(params, ids_BT):
    first = jax.tree.map(lambda x: x[0], params["blocks"])
    x_BTD = small.layer_norm(params["emb"]["embedding"][ids_BT], params["ln0"])
    x_BTD = small.layer_norm(x_BTD, first["ln1"])
    previous_BTD, mix_D = np.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1], first["att"]["time_mix_k"]
    return (mix_D * x_BTD + (1 - mix_D) * previous_BTD) @ first["att"]["key"]["kernel"]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in DECAYS])
def test_make_diagnose_agrees_with_numpy_on_parameters_and_the_next_step(kind):
    model, params = small.drawn(small.make(kind))
    tx, zero, ids = optim.optimiser(), np.zeros((), np.int32), small.tokens(B, T + 1)
    batch, lr = {"tokens": ids, "mask": np.ones((B, T), bool)}, np.float32(1e-2)

    @jax.jit
    def both(params):
        state = train.TrainState(zero, params, tx.init(params), zero)
        same, values = make_diagnose(model, tx)(state, batch, lr)
        after, row = train.make_step(model, tx)(state, batch, lr)
        return same.params, values, after.params, row["grad_norm"], model.apply({"params": params}, ids[:, :-1])[0]

    same, values, after, grad_norm, logits = jax.device_get(both(params))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    moved = jax.tree.map(np.subtract, after, params)
    for name, tree in {"parameter_norm": params, "update_norm": moved}.items():
        groups = {}
        for path, x in flatten_dict(tree).items():
            groups.setdefault(group_of(path, DECAYS[kind]), []).append(x.ravel())
        norms = {group: np.linalg.norm(np.concatenate(leaves)) for group, leaves in groups.items()}
        assert values[name] == pytest.approx(norms, rel=1e-5)
    assert np.linalg.norm([*values["gradient_norm"].values()]) == pytest.approx(grad_norm, rel=1e-5)
    assert values["logit_max"] == pytest.approx(logits.max(), rel=1e-5)
    assert values["k_max"].shape == (small.L,) and (values["k_max"] > 0).all()
    if kind == "rwkv4":
        largest = np.abs(keys_of_the_first_layer(params, ids[:, :-1])).max()
        assert values["k_max"][0] == pytest.approx(largest, rel=1e-5)
    for shares in values["dead_channels"].values():
        assert shares.shape == (small.L,) and ((shares >= 0) & (shares <= 1)).all()


def test_observed_counts_channels_that_forget_or_are_inactive():
    """exp(-exp(w)) of the decays: 0.37, 0.0006, 0.95, 0.96."""
    params = {"att": {"time_decay": np.float32([0, 2, -3, -3.1])}}
    seen = rwkv4.observed(params, {"att": {"k_max": 5.0}, "ffn": {"active_F": np.float32([1, 0, 1, 1, 1])}})
    assert seen["k_max"] == 5
    assert seen["dead_channels"] == pytest.approx({"forgetting": 0.25, "inactive": 0.2})


def test_make_diagnose_on_two_devices_takes_maxima_over_both():
    model, params = small.drawn(small.make("rwkv4"))
    tx, zero, ids = optim.optimiser(), np.zeros((), np.int32), small.tokens(B, T + 1)
    batch = {"tokens": ids, "mask": np.ones((B, T), bool)}
    apart = jax.tree.map(lambda x: x[:, None], batch)

    @jax.jit
    def both(params):
        state = train.TrainState(zero, params, tx.init(params), zero)
        diagnose = lambda batch, name: make_diagnose(model, tx)(state, batch, np.float32(1e-2), name)[1]
        return diagnose(batch, None), jax.vmap(lambda batch: diagnose(batch, "d"), axis_name="d")(apart)

    whole, on_two = jax.device_get(both(params))
    jax.tree.map(lambda x, two: np.testing.assert_allclose(two, np.stack([x, x]), rtol=2e-5), whole, on_two)
