"""The LSTM baseline; test_lm.py has the tests that it shares with the other models."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from judge import error_ratio
from small import D, forward, layer_norm, made, tokens

from rwkv_jax import hardware
from rwkv_jax.models import build, parameter_shapes, unstack
from rwkv_jax.models.block import BlockConfig
from rwkv_jax.models.lstm import LayerState, hidden_dim, lstm

B, T, F = 2, 6, 5


def test_lstm_equals_the_cell_of_flax():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x_BTD, recurrent_FG, bias_G, state = draw(B, T, D), draw(F, 4 * F), draw(4 * F), LayerState(draw(B, F), draw(B, F))
    input_DG = draw(D, 4 * F)
    params = {}
    for name, w, r, b in zip(
        "ifgo", *(np.split(x, 4, axis=-1) for x in (input_DG, recurrent_FG, bias_G)), strict=True
    ):
        params |= {f"i{name}": {"kernel": w}, f"h{name}": {"kernel": r, "bias": b}}

    step = jax.jit(nn.OptimizedLSTMCell(F).apply)
    carry, expected = (state.c_BF, state.h_BF), []
    for t in range(T):
        carry, h_BF = step({"params": params}, carry, x_BTD[:, t])
        expected.append(h_BF)
    h_BTF, after = lstm(x_BTD @ input_DG + bias_G, recurrent_FG, state)
    assert error_ratio(h_BTF, np.stack(expected, axis=1)) < 1e-6
    assert error_ratio(after.c_BF, carry[0]) < 1e-6 and error_ratio(after.h_BF, carry[1]) < 1e-6


def test_lstm_model_follows_its_formula():
    model, params = made("lstm")
    ids_BT, sigmoid = tokens(B, T), lambda x: 1 / (1 + np.exp(-x))
    wide = jax.tree.map(np.float64, unstack(params))
    x = layer_norm(wide["emb"]["embedding"][ids_BT], wide["ln0"])
    for layer in range(model.num_layers):
        p = wide[f"blocks_{layer}"]["lstm"]
        input_BTG = layer_norm(x, wide[f"blocks_{layer}"]["ln1"]) @ p["input"]["kernel"] + p["bias"]
        h, c, out = np.zeros((B, len(p["recurrent_kernel"]))), 0, []
        for t in range(T):
            i, f, g, o = np.split(input_BTG[:, t] + h @ p["recurrent_kernel"], 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        x = x + np.stack(out, axis=1) @ p["output"]["kernel"]
    expected = layer_norm(x, wide["ln_out"]) @ wide["head"]["kernel"]
    assert error_ratio(forward(model, params, ids_BT)[0], expected) < 2e-6


@pytest.mark.parametrize("dim", [8, 512])
def test_lstm_hidden_dim_defaults_to_the_nearest_to_13_D2_a_layer(dim):
    weights = lambda F: 4 * dim * F + 4 * F**2 + F * dim
    F = hidden_dim(BlockConfig(dim, 1))
    assert min((F - 1, F, F + 1), key=lambda F: abs(weights(F) - 13 * dim**2)) == F
    model = build("lstm", vocab_size=256, num_layers=2, dim=dim)
    blocks = parameter_shapes(model)["blocks"]
    assert sum(x.size for x in jax.tree.leaves(blocks) if x.ndim == 3) == 2 * weights(F)
    assert hardware.flops_per_token(model, 64) == 6 * (256 * dim + 2 * weights(F))


def test_lstm_init_opens_forget_gates_and_has_zero_outputs():
    model = build("lstm", vocab_size=11, num_layers=1, dim=8)
    params = jax.jit(lambda seed: model.init(jax.random.key(seed), tokens(1, 2))["params"])(0)
    layer = jax.tree.map(np.asarray, params["blocks"]["lstm"])
    assert not layer["output"]["kernel"].any()
    np.testing.assert_array_equal(np.split(layer["bias"][0], 4), [[0] * 10, [1] * 10, [0] * 10, [0] * 10])
    for gate_FF in np.split(layer["recurrent_kernel"][0], 4, axis=1):
        np.testing.assert_allclose(gate_FF @ gate_FF.T, np.eye(10), atol=1e-6)
