"""The LSTM baseline; what it shares with the other models is in test_models.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import made, tokens

from rwkv_jax import hardware
from rwkv_jax.models import build, rewind, unstack
from rwkv_jax.models.lstm import LayerState, default_hidden_dim, lstm

B, T, D, F = 2, 6, 3, 5


def test_the_recurrence_is_that_of_the_library():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x_BTD, recurrent_FG, bias_G, state = draw(B, T, D), draw(F, 4 * F), draw(4 * F), LayerState(draw(B, F), draw(B, F))
    input_DG = draw(D, 4 * F)
    params = {}
    for name, w, r, b in zip(
        "ifgo", *(np.split(x, 4, axis=-1) for x in (input_DG, recurrent_FG, bias_G)), strict=True
    ):
        params |= {f"i{name}": {"kernel": w}, f"h{name}": {"kernel": r, "bias": b}}
    cell, carry, expected = nn.OptimizedLSTMCell(F), (state.c_BF, state.h_BF), []
    for t in range(T):
        carry, h_BF = cell.apply({"params": params}, carry, x_BTD[:, t])
        expected.append(h_BF)
    h_BTF, after = jax.jit(lstm)(x_BTD @ input_DG + bias_G[None, None], recurrent_FG, state)
    assert error_ratio(h_BTF, np.stack(expected, axis=1)) < 1e-6
    assert error_ratio(after.c_BF, carry[0]) < 1e-6 and error_ratio(after.h_BF, carry[1]) < 1e-6


@pytest.mark.parametrize("dim", [32, 128, 512, 768])
def test_no_other_whole_width_is_nearer_to_13_D2_a_layer(dim):
    weights = lambda F: 4 * dim * F + 4 * F**2 + F * dim
    F = default_hidden_dim(dim)
    assert min((F - 1, F, F + 1), key=lambda F: abs(weights(F) - 13 * dim**2)) == F
    model = build("lstm", vocab_size=256, num_layers=2, dim=dim)
    blocks = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["blocks"]
    assert sum(x.size for x in jax.tree.leaves(blocks) if x.ndim == 3) == 2 * weights(F)
    assert hardware.flops_per_token(model, 64) == 6 * (256 * dim + 2 * weights(F))


def test_at_the_start_layers_pass_on_what_they_get_and_forget_gates_are_open():
    params = jax.jit(build("lstm", vocab_size=11, num_layers=1, dim=8).init)(jax.random.key(0), tokens(1, 2))["params"]
    layer = jax.tree.map(np.asarray, params["blocks"]["lstm"])
    assert not layer["output"]["kernel"].any()
    np.testing.assert_array_equal(np.split(layer["bias"][0], 4), [[0] * 10, [1] * 10, [0] * 10, [0] * 10])
    for gate_FF in np.split(layer["recurrent_kernel"][0], 4, axis=1):
        np.testing.assert_allclose(gate_FF @ gate_FF.T, np.eye(10), atol=1e-6)


def test_it_cannot_go_back_within_a_pass():
    model, params = made("lstm")
    with pytest.raises(ValueError, match=r"layers are .*lstm.*, expected rwkv4 and attention"):
        rewind.read(model.clone(scan=False), unstack(params), tokens(B, T), model.init_state(B))
