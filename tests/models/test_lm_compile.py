"""Tracing, compiling and rematerialisation of a model: un-jitted calls, and one trace for each block."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import assert_same, error_ratio
from small import KINDS, forward, made, make, shapes_of, tokens

from rwkv_jax.models import unstack

PROGRAMS = 120  # un-jitted, each operation is a program of its own
SLOWLY = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
B, T = 12, 16


def layout(kind, scan):
    _, params = made(kind)
    return make(kind, scan=scan), params if scan else unstack(params)


# ------------------------------------------------------------------------------------------ un-jitted calls


@pytest.mark.parametrize(
    ("kind", "past"),  # and masks
    [("hybrid", True), SLOWLY("rwkv4", False), *(SLOWLY(kind, True) for kind in KINDS if kind != "hybrid")],
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
        assert_same(first, jitted)
        compiled()
        again = model.apply({"params": params}, tokens(B, T), state, **masks)
        assert compiled() == 0
        jax.tree.map(np.testing.assert_array_equal, again, first)


def test_lm_runs_layer_by_layer_in_plain_unjitted_calls_only():
    """Under a transform, with dropout, or with collected intermediates, layers stay in their scan."""
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


# ---------------------------------------------------------------------------------------- one trace a block


@pytest.mark.parametrize(
    ("kind", "scan"), [("hybrid", True), ("lstm", False), *(SLOWLY(kind, True) for kind in KINDS if kind != "hybrid")]
)
def test_lm_traces_a_block_once_for_a_gradient(kind, scan):
    """Stacked, each kind of the repeating unit is traced once; unstacked, each layer."""
    model, calls = make(kind, scan=scan), []
    shapes = shapes_of(model)
    blocks = {record.block for _, record, _ in model.unit}

    def record(call, args, kwargs, context):
        if type(context.module) in blocks and context.method_name == "__call__":
            calls.append(type(context.module))
        return call(*args, **kwargs)

    loss = lambda params: jnp.square(model.apply({"params": params}, tokens(2, 8))[0]).mean()
    with nn.intercept_methods(record):
        jax.jit(jax.grad(loss)).trace(shapes)
    stacked = len(model.layers) if model.layers_apart < model.num_layers else 0
    assert len(calls) == model.layers_apart + stacked


# ------------------------------------------------------------------------------------------ rematerialisation

# Matrix products of a layer that a policy computes twice. "outputs": those before the recurrence and before ffn_value;
# "block": the one after it too, and in RWKV ffn_value, which its gate multiplies, in attention its own two.
RECOMPUTED = {
    "rwkv4": {"matmuls": 0, "outputs": 5, "block": 7},
    "transformer": {"matmuls": 0, "outputs": 4, "block": 7},
}


def operations(jaxpr, counts=None):
    """Number of each primitive in a program: the body of a loop counts once, a jitted function once for each call."""
    counts = collections.Counter() if counts is None else counts
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    operations(part, counts)
    return counts


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])
def test_lm_remat_changes_no_gradient_and_takes_less_memory(kind, scan):
    """Computed in float64: the norm of a head amplifies the rounding of a small y."""
    model, params = made(kind, num_layers=4, dim=32, head_size=16, dtype="float64", param_dtype="float64")
    model, params = (model, params) if scan else (model.clone(scan=False), unstack(params))
    ids = tokens(2, 128)

    def compiled(remat):
        loss = lambda params: jnp.square(model.clone(remat=remat).apply({"params": params}, ids)[0]).mean()
        return jax.jit(jax.grad(loss)).lower(params).compile()

    programs = {remat: compiled(remat) for remat in ("none", "matmuls", "outputs", "block")}
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs.values()]
    if scan:  # XLA's CPU compiler merges unrolled computations that are equal
        assert memory == sorted(memory, reverse=True) and memory[-1] < 0.7 * memory[0]
    whole = programs.pop("none")(params)
    for program in programs.values():
        assert max(jax.tree.leaves(jax.tree.map(error_ratio, program(params), whole))) < 1e-12


@pytest.mark.parametrize(("kind", "scan"), [("rwkv4", True), ("transformer", False)])
def test_lm_remat_recomputes_only_the_values_that_its_policy_drops(kind, scan):
    model, params = made(kind, num_layers=1, scan=scan)  # the program of a stack holds one layer

    def count(remat):
        loss = lambda params: model.clone(remat=remat).apply({"params": params}, tokens(2, 8))[0].sum()
        return operations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    kept = count("none")
    for remat, recomputed in RECOMPUTED[kind].items():
        found = count(remat)
        assert found["dot_general"] - kept["dot_general"] == recomputed, remat
        # the recurrence itself
        assert (found["scan"] > kept["scan"]) == (kind == "rwkv4" and remat == "block"), remat
