"""Methods of fine-tuning: gradients of a tuned state, files of adapters, and mistakes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import training

import rwkv_jax
from rwkv_jax import finetune
from rwkv_jax.models import lora
from rwkv_jax.train import assemble, methods, run_config
from rwkv_jax.train.methods import Method

D = small.D
LORA = Method("lora", 2, 4.0, "att/(key|output)|head")


@pytest.fixture(scope="module")
def base():
    """(model, params), each array NumPy."""
    return small.drawn(small.make("rwkv4"), scale=0.2)


def _drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def _adapters(model, params):
    return _drawn(jax.eval_shape(lambda params: LORA.split(model, params, jax.random.key(0))[0], params))


def test_tuned_state_has_a_gradient_unlike_the_empty_one():
    """Row 0 of the batch begins with the tuned state, row 1 with the empty one."""
    model, params = small.drawn(small.make("rwkv4", num_layers=1, scan=False, receptance=False), scale=0.2)
    tokens_BT = np.tile(small.tokens(1, 8), (2, 1))
    empty = model.init_state(1)

    @jax.jit
    @jax.grad
    def gradients(tuned_and_empty):
        tuned, wkv = tuned_and_empty
        rows = methods.tuned_state(model, tuned, 1), tuple(e._replace(wkv=w) for e, w in zip(empty, wkv, strict=True))
        state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *rows)
        return model.apply({"params": params}, tokens_BT, state)[0].std((1, 2)).sum()

    of_tuned, of_empty = gradients((methods.untuned_state(model), tuple(entry.wkv for entry in empty)))
    # at value 0 the gradient by log_den, (value - average) times a share, is not zero
    for name in ("att_last", "value", "log_den", "ffn_last"):
        assert np.count_nonzero(of_tuned["blocks"][name]) == D
    assert not any(np.any(x) for x in jax.tree.leaves(of_empty))


@pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])
def test_tuned_state_of_heads_has_a_gradient_at_zero_in_matrices_alone(kind):
    model, params = small.drawn(small.make(kind, scan=False), scale=0.2)
    untuned = methods.untuned_state(model)
    assert jax.tree.map(jnp.shape, untuned) == {"blocks": {"wkv": (small.L, 2, 4, 4)}}
    assert not np.any(untuned["blocks"]["wkv"])
    state = methods.tuned_state(model, _drawn(untuned), 3)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, jax.eval_shape(lambda: model.init_state(3)))
    assert not any(np.any(layer.att_last) or np.any(layer.ffn_last) for layer in state)

    @jax.jit
    @jax.grad
    def gradient(tuned):
        bound, state = Method("state").bind(model, tuned, params, 2)
        return model.apply({"params": bound}, small.tokens(2, 8), state)[0].std((1, 2)).sum()

    assert np.all(gradient(untuned)["blocks"]["wkv"])


def test_tuned_context_has_read_the_separator_after_the_tuned_state(base):
    model, params = base
    tuned = _drawn(methods.untuned_state(model))
    context = finetune.tuned_context(model, params, tuned)
    logits_BTV, state = small.forward(model, params, np.zeros((1, 1), np.int32), methods.tuned_state(model, tuned, 1))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    close(context.logits_BV, logits_BTV[:, -1])
    jax.tree.map(close, context.state, state)


def test_tuned_state_is_value_and_denominator_in_every_row(base):
    tuned = _drawn(methods.untuned_state(base[0]))["blocks"]
    for i, layer in enumerate(methods.tuned_state(base[0], {"blocks": tuned}, 3)):
        den_D = np.exp(tuned["log_den"][i])
        expected = tuned["att_last"][i], (tuned["value"][i] * den_D, den_D, 0 * den_D), tuned["ffn_last"][i]
        for x_BD, x_D in zip(jax.tree.leaves(layer), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x_BD, np.tile(x_D, (3, 1)), rtol=1e-6)


def test_load_adapters_inverts_save_adapters_for_the_same_model_alone(base, tmp_path):
    model, params = base
    adapters, path = _adapters(model, params), tmp_path / "a.safetensors"
    finetune.save_adapters(path, model, params, adapters, 3.0)
    found, alpha = finetune.load_adapters(path, model, params)
    assert alpha == 3.0 and training.same(found, adapters)
    other = params | {"head": jax.tree.map(lambda x: x + 1, params["head"])}
    with pytest.raises(ValueError, match="holds the adapters of another model"):
        finetune.load_adapters(path, model, other)
    apart, params_apart = model.clone(scan=False), rwkv_jax.unstack(params)  # whose leaves have other names
    with pytest.raises(ValueError, match=r"adapters of 'blocks/att/key', .* have one set a layer \(scan=False\)"):
        finetune.load_adapters(path, apart, params_apart)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("key/lora_b", "key/lora_c", "lora_[ac], expected lora_a and lora_b of blocks/att/key"),
        ("att/key/lora_b", "att/kex/lora_b", "key/lora_a, expected lora_a and lora_b of blocks/att/key"),
        ('"alpha"', '"alphb"', "alpha is None, expected a number"),
        ('"3.0"', '"3.x"', "alpha is '3.x', expected a number"),
    ],
)
def test_load_adapters_refuses_a_damaged_header(old, new, expected, base, tmp_path):
    model, params = base
    path = tmp_path / "a.safetensors"
    finetune.save_adapters(path, model, params, _adapters(model, params), 3.0)
    header = path.read_bytes()
    assert header.count(old.encode()) == 1
    path.write_bytes(header.replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=expected):
        finetune.load_adapters(path, model, params)


@pytest.mark.slow
def test_finetune_merges_adapters_of_one_set_a_layer(base, tmp_path):
    model, params = base
    rwkv_jax.save(tmp_path / "base.pth", model, params)
    apart, params = model.clone(scan=False), rwkv_jax.unstack(params)
    adapters = _adapters(apart, params)
    finetune.save_adapters(tmp_path / "a.safetensors", apart, params, adapters, 3.0)
    paths = [str(tmp_path / name) for name in ("base.pth", "a.safetensors", "merged.pth")]
    assert finetune.main(["merge", *paths]) == 0
    _, merged = rwkv_jax.load(paths[-1], scan=False)
    assert training.same(merged, lora.merge(jax.device_put(params), adapters, 3.0))


def test_load_adapters_refuses_adapters_of_other_sizes(base, tmp_path):
    model, params = base
    path = tmp_path / "a.safetensors"
    adapters = _adapters(model, params)
    adapters["blocks"]["att"]["key"]["lora_a"] = adapters["blocks"]["att"]["key"]["lora_a"][..., :-1]
    finetune.save_adapters(path, model, params, adapters, 3.0)
    with pytest.raises(ValueError, match=r"blocks/att/key has A \(2, 8, 1\) and B \(2, 2, 8\), its kernel \[8, 8\]"):
        finetune.load_adapters(path, model, params)


@pytest.mark.parametrize(
    "kind, method, expected",
    [
        ("hybrid", Method("state"), "is 'state', expected full or lora: 'attention' has no tunable state"),
        ("rwkv4", Method("lora", 2, 4.0, "attention"), "LoRA targets 'attention' match no kernel, expected some of"),
        ("rwkv4", Method(groups=(("atr", 0.0),)), "optim.groups: 'atr' matches none of blocks/att/key/kernel"),
    ],
)
def test_method_check_names_models_that_it_cannot_train(kind, method, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        method.check(small.make(kind))


def test_finetune_command_reports_mistakes_in_one_line(tmp_path, base, capsys):
    weights, there = tmp_path / "base.pth", tmp_path / "x"
    rwkv_jax.save(weights, *base)
    for arguments in (["merge", weights, weights, there], ["export", tmp_path, there]):
        assert finetune.main([str(x) for x in arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == [weights]


def test_completed_reads_sizes_that_are_not_defaults_from_the_weights(tmp_path):
    fields = {"vocab_size": 256, "num_layers": 2, "dim": 16, "head_size": 8, "low_ranks": (2, 3, 4, 5)}
    weights = tmp_path / "m.safetensors"
    model = rwkv_jax.build("rwkv7", head_norm_epsilon=1e-5, **fields)
    rwkv_jax.save(weights, *small.drawn(model))
    config = run_config.read("configs/finetune.py", [f"--config.finetune.model={weights}"])
    assert run_config.check(assemble.completed(config)).unit == model.unit
