"""What a model traces, compiles and computes again: un-jitted calls, one trace a block, rematerialisation."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import L, forward, made, make, shapes_of, tokens

from rwkv_jax.models import attention, lstm, rwkv4, unstack

PROGRAMS = 120  # un-jitted, each operation is a program of its own
SLOWLY = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
B, T = 12, 16


def same(actual, expected, limit=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_array_less(error_ratio(a, b), limit), actual, expected)


def layout(kind, scan):
    _, params = made(kind)
    return make(kind, scan=scan), params if scan else unstack(params)


# ------------------------------------------------------------------------------------------ un-jitted calls


@pytest.mark.parametrize(
    ("kind", "past"),  # and masks
    [
        ("rwkv4", False),
        ("hybrid", True),
        *(SLOWLY("rwkv4", True), SLOWLY("hybrid", False)),
        *(SLOWLY(kind, past) for kind in ("transformer", "lstm") for past in (False, True)),
    ],
)
def test_lm_unjitted_apply_compiles_once_and_equals_the_jitted_one(kind, past, compiled):
    model, params = made(kind)
    state = model.init_state(B, max_length=T) if past else None
    rng = np.random.default_rng(0)
    masks = {"reset_BT": rng.random((B, T)) < 0.3, "valid_BT": rng.random((B, T)) < 0.7} if past else {}
    jitted = forward(model, params, tokens(B, T), state, *masks.values())
    for scan in (True, False):
        model, params = layout(kind, scan)
        first = model.apply({"params": params}, tokens(B, T), state, **masks)
        same(first, jitted)
        compiled()
        again = model.apply({"params": params}, tokens(B, T), state, **masks)
        assert compiled() == 0
        jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unstacked"])
def test_lm_unjitted_apply_calls_interceptors_every_time(scan):
    model, params = layout("rwkv4", scan)
    calls = []

    def record(call, args, kwargs, context):
        calls.append((type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply({"params": params}, tokens(B, T))
        first = list(calls)
        model.apply({"params": params}, tokens(B, T))
    assert calls == first * 2
    counts = collections.Counter(first)
    assert counts["Block", "__call__"] == counts["TimeMix", "__call__"] == L and counts["Embed", "__call__"] == 1
    assert counts["LM", "hidden"] == 1


def test_lm_runs_layer_by_layer_in_plain_unjitted_calls_only():
    """Under a transform, with dropout, or where intermediates are collected, layers stay in their scan."""
    model, params = made("rwkv4")
    plain = {"params": params}
    eager = lambda model, variables=plain, **kw: model.bind(variables, **kw)._eager(tokens(B, T))
    assert eager(model)
    assert not eager(model, mutable=["intermediates"])
    assert not eager(model, mutable=["params"])
    dropping = make("rwkv4", dropout=0.5)
    assert eager(dropping) and not eager(dropping, rngs={"dropout": jax.random.key(0)})
    traced = []
    jax.eval_shape(lambda params: traced.append(eager(model, {"params": params})), params)
    jax.eval_shape(lambda ids: traced.append(model.bind(plain)._eager(ids)), tokens(B, T))
    assert traced == [False, False]


@pytest.mark.slow
def test_lm_unjitted_apply_drops_out_and_collects_as_the_jitted_one():
    model, params = made("rwkv4", dropout=0.5)
    run = lambda: model.apply(
        {"params": params}, tokens(B, T), rngs={"dropout": jax.random.key(0)}, mutable=["intermediates"]
    )
    same(run(), jax.jit(run)())
    same(model.apply({"params": params}, tokens(B, T)), jax.jit(model.apply)({"params": params}, tokens(B, T)))


# ---------------------------------------------------------------------------------------- one trace a block

BLOCKS = (rwkv4.Block, attention.Block, lstm.Block)


@pytest.mark.parametrize(
    ("kind", "scan"),
    [
        ("rwkv4", True),
        ("hybrid", True),
        ("lstm", False),
        *(SLOWLY("transformer", True), SLOWLY("lstm", True)),
        *(SLOWLY(kind, False) for kind in ("rwkv4", "transformer", "hybrid")),
    ],
)
def test_lm_traces_a_block_once_for_a_gradient(kind, scan):
    """Stacked: once each kind of the repeating unit; else once a layer."""
    model, calls = make(kind, scan=scan), []

    def record(call, args, kwargs, context):
        if type(context.module) in BLOCKS and context.method_name == "__call__":
            calls.append(type(context.module))
        return call(*args, **kwargs)

    loss = lambda params: jnp.square(model.apply({"params": params}, tokens(2, 8))[0]).mean()
    shapes = shapes_of(model)
    with nn.intercept_methods(record):
        jax.jit(jax.grad(loss)).trace(shapes)
    assert len(calls) == (len(model.layers) if scan else model.num_layers)


def test_lm_traces_initial_values_at_the_start_only(monkeypatch):
    """A formula over the channels is no part of a forward pass."""
    model, asked = make("rwkv4"), []
    monkeypatch.setattr(rwkv4, "mix_ramp", lambda *args: lambda: asked.append(args) or jnp.zeros(model.dim))
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens(1, 1))["params"]
    assert asked
    del asked[:]
    jax.eval_shape(lambda params: model.apply({"params": params}, tokens(1, 1)), shapes)
    assert not asked


# ------------------------------------------------------------------------------------------ rematerialisation

# Matrix products of a layer that a policy computes twice. "outputs": those before the recurrence and before ffn_value;
# "block": the one after it too, and in RWKV ffn_value, which its gate multiplies, in attention its own two.
RECOMPUTED = {
    "rwkv4": {"matmuls": 0, "outputs": 5, "block": 7},
    "transformer": {"matmuls": 0, "outputs": 4, "block": 7},
}


def operations(jaxpr, counts=None):
    """How often each primitive stands in a program: the body of a loop once, a jitted function once a call."""
    counts = collections.Counter() if counts is None else counts
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    operations(part, counts)
    return counts


def gradient_of(kind, scan, remat, *shape, layers=L):
    model = make(kind, scan=scan, remat=remat, num_layers=layers)
    loss = lambda params: jnp.square(model.apply({"params": params}, tokens(*shape))[0]).mean()
    return jax.value_and_grad(loss)


@pytest.mark.parametrize(("kind", "scan"), [("rwkv4", True), ("transformer", False)])
def test_lm_remat_computes_again_what_the_policy_drops(kind, scan):
    _, params = made(kind, num_layers=1, scan=scan)  # of a stack, the program holds one layer
    count = lambda remat: operations(jax.make_jaxpr(gradient_of(kind, scan, remat, 2, 8, layers=1))(params).jaxpr)
    kept = count("none")
    for remat, recomputed in RECOMPUTED[kind].items():
        found = count(remat)
        assert found["dot_general"] - kept["dot_general"] == recomputed, remat
        # the recurrence itself
        assert (found["scan"] > kept["scan"]) == (kind == "rwkv4" and remat == "block"), remat


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scan"), [("rwkv4", True), ("transformer", False)])
def test_lm_remat_changes_neither_value_nor_gradient_and_takes_less_memory(kind, scan):
    """Where activations are what fills it; two layers unrolled hold little at one time."""
    _, params = layout(kind, scan)
    compile = lambda remat: jax.jit(gradient_of(kind, scan, remat, 8, 64)).lower(params).compile()
    plain = compile("none")
    expected, memory = plain(params), plain.memory_analysis().temp_size_in_bytes
    for remat in RECOMPUTED[kind]:
        program = compile(remat)
        same(program(params), expected, 1e-5)
        before, memory = memory, program.memory_analysis().temp_size_in_bytes
        assert memory < before or not scan or remat == "matmuls", remat
