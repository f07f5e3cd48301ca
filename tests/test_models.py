"""What holds for every model behind the one signature: RWKV-4, the transformer, the LSTM and hybrids."""

import functools
import json
from dataclasses import fields

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import KINDS, D, L, V, forward, made, make, tokens

import rwkv_jax
from rwkv_jax.models import LM, SIZES, build, stack, unstack

PURE = ("rwkv4", "transformer", "lstm")
B, T = 3, 7  # one shape in most tests: what is compiled once serves them all


def same(actual, expected, limit=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_array_less(error_ratio(a, b), limit), actual, expected)


# --------------------------------------------------------------------------------------------- parameters


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("size", "parameters"),  # Table 2
    [
        ("169m", 169_342_464),
        ("430m", 430_397_440),
        ("1b5", 1_515_106_304),
        ("3b", 2_984_627_200),
        ("7b", 7_392_649_216),
        ("14b", 14_148_597_760),
    ],
)
def test_parameter_counts_of_the_released_sizes(size, parameters, scan):
    model = build("rwkv4", size=size, scan=scan)
    V, L, D = model.vocab_size, model.num_layers, model.dim
    assert count(shapes_of(model)) == parameters == 2 * V * D + 13 * D * D * L + D * (11 * L + 4)
    assert size in SIZES


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm"])  # nearly: see test_lstm.py
def test_every_model_has_13_D2_of_matrices_a_layer(kind):
    model = make(kind, dim=32, scan=False)
    layers = [v for k, v in shapes_of(model).items() if k.startswith("blocks_")]
    for layer in layers:
        assert sum(x.size for x in jax.tree.leaves(layer) if x.ndim == 2) == 13 * 32**2
    assert len(layers) == model.num_layers


@pytest.mark.parametrize("kind", KINDS)
def test_stack_and_unstack_are_inverse(kind):
    model, params = made(kind)
    layers = unstack(params)
    assert shapes_of(make(kind, scan=False)) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), layers)
    jax.tree.map(np.testing.assert_array_equal, stack(layers, period=len(model.layers)), params)


# ---------------------------------------------------------------------------------------- one computation


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_equals_token_by_token_stacked_or_not(kind):
    """One pass without a past, stacked; the same after an empty past; token by token from one set a layer."""
    model, params = made(kind)
    unrolled, layers = make(kind, scan=False), unstack(params)
    ids = tokens(B, T)
    logits, _ = forward(model, params, ids)
    assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
    same(forward(unrolled, layers, ids)[0], logits)
    with_past, stacked_state = forward(model, params, ids, model.init_state(B, max_length=T))
    same(with_past, logits)
    state, steps = unrolled.init_state(B, max_length=T), []
    for t in range(T):
        step, state = forward(unrolled, layers, ids[:, t : t + 1], state)
        steps.append(step)
    same(np.concatenate(steps, axis=1), logits)
    same(state, stacked_state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_a_tuple_of_batch_first_leaves_that_a_call_leaves_alone(kind):
    model, params = made(kind)
    empty = model.init_state(B, max_length=T)
    before = jax.tree.map(np.array, empty)
    _, after = forward(model, params, tokens(B, T), empty)
    jax.tree.map(np.testing.assert_array_equal, empty, before)
    for state in (empty, after):
        assert isinstance(state, tuple) and len(state) == model.num_layers
        assert all(x.shape[0] == B and x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    spec = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert spec(empty) == spec(after) == spec(make(kind, scan=False).init_state(B, T))
    _, fresh = forward(model, params, tokens(B, T))  # no past given: a full state from RWKV, no cache from attention
    kinds = model.layers * (model.num_layers // len(model.layers))
    assert [entry is None for entry in fresh] == [layer == "attention" for layer in kinds]
    if model.recurrent:
        same(fresh, after)


# Matrix products of a layer that a policy computes twice. "outputs": those before the recurrence and before ffn_value;
# "block": the one after it too, and in RWKV ffn_value, which its gate multiplies, in attention its own two.
RECOMPUTED = {
    "rwkv4": {"matmuls": 0, "outputs": 5, "block": 7},
    "transformer": {"matmuls": 0, "outputs": 4, "block": 7},
}


@pytest.mark.parametrize(("kind", "scan"), [("rwkv4", True), ("transformer", False)])
def test_remat_changes_neither_value_nor_gradient(kind, scan):
    """And less memory the less it keeps, where the activations are what fills it."""
    _, params = made(kind)
    params = params if scan else unstack(params)
    ids = tokens(8, 64)

    def gradient(remat):
        model = make(kind, scan=scan, remat=remat)
        loss = lambda params: jnp.square(model.apply({"params": params}, ids)[0]).mean()
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        text = lowered.as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.while"), lowered

    products, loops, lowered = gradient("none")
    plain = lowered.compile()
    expected, memory = plain(params), plain.memory_analysis().temp_size_in_bytes
    layers_in_text = 1 if scan else L
    for remat, recomputed in RECOMPUTED[kind].items():
        more_products, more_loops, lowered = gradient(remat)
        assert more_products - products == recomputed * layers_in_text, remat
        assert (more_loops > loops) == (kind == "rwkv4" and remat == "block"), remat  # the recurrence itself
        if (kind == "rwkv4") == (remat != "outputs"):
            program = lowered.compile()
            same(program(params), expected, 1e-5)
            before, memory = memory, program.memory_analysis().temp_size_in_bytes
            assert memory < before or not scan, remat  # two layers unrolled hold little at one time


def test_remat_of_earlier_runs_is_a_policy():
    assert (make("rwkv4", remat=True).remat, make("rwkv4", remat=False).remat) == ("block", "none")
    with pytest.raises(ValueError, match="unknown model field remat 'blocks': did you mean 'block'"):
        make("rwkv4", remat="blocks")


def test_hidden_and_logits_are_the_two_halves_of_a_call():
    model, params = made("hybrid")
    state = model.init_state(B, T)
    call = lambda method, *inputs: jax.jit(functools.partial(model.apply, method=method))({"params": params}, *inputs)
    x_BTD, after = call("hidden", tokens(B, T), state)
    assert x_BTD.shape == (B, T, D)
    logits, whole = forward(model, params, tokens(B, T), state)
    same(call("logits", x_BTD[:, -1:]), logits[:, -1:])
    same(after, whole)


@pytest.mark.parametrize("kind", PURE)
def test_bfloat16_activations_leave_logits_and_state_in_float32(kind):
    _, params = made(kind)
    model = make(kind, dtype="bfloat16")
    state = model.init_state(B, max_length=T)
    logits, after = forward(model, params, tokens(B, T), state)
    assert logits.dtype == jnp.float32
    is_cache = lambda path: any(getattr(entry, "name", "").startswith(("k_", "v_")) for entry in path)
    for path, x in jax.tree_util.tree_leaves_with_path((state, after)):
        expected = (jnp.bfloat16,) if is_cache(path) else (jnp.float32, jnp.int32)
        assert x.dtype in expected, path
    exact, _ = forward(make(kind), params, tokens(B, T))
    # about 20 roundings of 2^-9 in a row
    assert 1e-4 < error_ratio(logits, exact) < 0.04
    # and none of the logits themselves
    assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize(("kind", "scan"), [("rwkv4", True), ("rwkv4", False), ("transformer", True)])
def test_one_layer(kind, scan):
    model = make(kind, num_layers=1, scan=scan)

    @jax.jit
    def gradient(key):
        params = model.init(key, tokens(1, 1))["params"]
        loss = lambda params: jnp.square(model.apply({"params": params}, tokens(B, T))[0]).mean()
        return params, jax.grad(loss)(params)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(jax.random.key(0))))


# ------------------------------------------------------------------------- documents, padding, causality

# one letter a token, "." is padding, a capital starts a document
LAYOUTS = ("..abcd.AbcdAb.cd", "AbcdAb.cd..Abcd.", "ab.cdAbcdAbcd...")


def masks_of(layouts):
    letters = np.array([list(row) for row in layouts])
    valid_BT = letters != "."
    return np.char.isupper(letters) | ~valid_BT, valid_BT  # a reset on padding is ignored


@pytest.mark.parametrize("kind", PURE)
def test_packed_documents_equal_separate_ones_and_padding_changes_nothing(kind):
    model, params = made(kind)
    N, P = 4, 2  # tokens of a document, three of them a row; tokens before and after the row
    reset_BT, valid_BT = masks_of(LAYOUTS)
    documents, past, following = tokens(B, 3, N), tokens(B, P, seed=1), tokens(B, P, seed=2)
    packed = np.full(valid_BT.shape, V - 1, np.int32)
    packed[valid_BT] = documents.reshape(-1)

    first, last = documents[:, 0], documents[:, 2]
    separate = (
        np.concatenate([documents, np.zeros((B, 3, P), np.int32)], axis=2).reshape(-1, N + P),
        np.concatenate([past, first], axis=1),
        np.concatenate([last, following], axis=1),
    )
    alone, continued, followed = np.split(forward(model, params, np.concatenate(separate))[0], [3 * B, 4 * B])
    alone = np.array(alone)[:, :N].reshape(B, 3, N, V)
    logits, _ = forward(model, params, packed, None, reset_BT, valid_BT)
    same(np.asarray(logits)[valid_BT].reshape(alone.shape), alone)

    # after a past, which the first document continues where no reset is set; then the last one is continued
    state = model.init_state(B, max_length=P + 3 * N + P)
    _, state = forward(model, params, past, state)
    logits, state = forward(model, params, packed, state, reset_BT, valid_BT)
    continues_B = [row.lstrip(".")[0].islower() for row in LAYOUTS]
    assert continues_B == [True, False, True]
    alone[continues_B, 0] = continued[continues_B, P:]
    same(np.asarray(logits)[valid_BT].reshape(alone.shape), alone)
    same(forward(model, params, following, state)[0], followed[:, N:])


@pytest.mark.parametrize("kind", PURE)
def test_a_token_depends_on_its_own_document_up_to_itself_and_on_nothing_else(kind):
    """d logits_t / d embedding_s is exactly zero for the future, other documents and padding, and nowhere else."""
    model, params = made(kind)
    layout = "ab.cAbc.dA.b"
    reset_BT, valid_BT = masks_of([layout])
    ids, weights_V = tokens(1, len(layout)), np.random.default_rng(3).standard_normal(V).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def influence(shift_BTD):
        def shifted(call, args, kwargs, context):
            out = call(*args, **kwargs)
            is_lookup = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
            return out + shift_BTD if is_lookup else out

        with nn.intercept_methods(shifted):
            logits_BTV, _ = model.apply({"params": params}, ids, reset_BT=reset_BT, valid_BT=valid_BT)
        return logits_BTV[0] @ weights_V

    influence_TT = np.abs(influence(jnp.zeros((*ids.shape, D)))).sum((1, 3))
    document_T = np.cumsum(reset_BT & valid_BT)
    t, s = np.arange(len(layout))[:, None], np.arange(len(layout))[None]
    expected_TT = (s <= t) & (document_T[:, None] == document_T[None]) & valid_BT
    real = valid_BT[0]  # the logits of padding are nobody's business
    np.testing.assert_array_equal((influence_TT > 0)[real], expected_TT[real])


# ---------------------------------------------------------------------------------------------- dropout


def norm_inputs(model, params, ids, **rngs):
    """(inputs of the norms by name, logits)."""
    seen = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm):
            seen[context.module.name] = args[0]
        return call(*args, **kwargs)

    @jax.jit
    def run(rngs):
        with nn.intercept_methods(record):
            logits, _ = model.apply({"params": params}, ids, rngs=rngs)
        # those inside a scan over layers cannot leave it
        return {name: x for name, x in seen.items() if not model.scan or name in ("ln0", "ln_out")}, logits

    return jax.tree.map(np.asarray, run(rngs))


@pytest.mark.parametrize("kind", ["rwkv4", "transformer"])
def test_dropout_is_on_the_embedding_and_after_each_add_where_a_key_is_given(kind):
    one = {"num_layers": 1, "scan": False}
    _, params = made(kind, **one)
    plain, dropped = make(kind, **one), make(kind, **one, dropout=0.5)
    ids = tokens(8, 32)
    without, logits = norm_inputs(plain, params, ids)
    np.testing.assert_array_equal(norm_inputs(dropped, params, ids)[1], logits)

    seen, _ = norm_inputs(dropped, params, ids, dropout=jax.random.key(0))
    zeros = {name: np.mean(x == 0) for name, x in seen.items()}
    assert zeros.keys() == {"ln0", "ln1", "ln2", "ln_out"} and zeros["ln1"] == 0
    assert all(0.45 < zeros[name] < 0.55 for name in ("ln0", "ln2", "ln_out"))
    kept = seen["ln0"] != 0
    np.testing.assert_allclose(seen["ln0"][kept], 2 * without["ln0"][kept], rtol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_drops_its_own(scan):
    model = make("rwkv4", dropout=0.5, num_layers=3, scan=scan)
    params = jax.jit(model.init)(jax.random.key(0), tokens(1, 1))["params"]  # every branch adds zero
    seen, _ = norm_inputs(model, params, tokens(8, 32), dropout=jax.random.key(0))
    # six independent masks leave 1/64 of what LN0 gives, one mask six times would leave half
    assert 1 / 128 < np.mean(seen["ln_out"] != 0) < 1 / 32


# ----------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("kind", KINDS)
def test_fields_survive_json(kind):
    model = make(kind, dtype="bfloat16", dropout=0.1, hidden_dim=24, embedding_scale=1e-3)
    values = {f.name: getattr(model, f.name) for f in fields(LM) if f.name not in ("parent", "name")}
    assert build(KINDS[kind]["name"], **json.loads(json.dumps(values))) == model


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"name": "rwkv"}, "unknown model name 'rwkv': did you mean 'rwkv4'?"),
        ({"name": "mamba"}, "unknown model name 'mamba': expected one of rwkv4, transformer, lstm"),
        ({"size": "169M"}, "unknown size '169M': did you mean '169m'?"),
        ({"vocab_sise": 5}, "unknown model field 'vocab_sise': did you mean 'vocab_size'?"),
        ({"parent": None}, "unknown model field 'parent'"),
        ({"layers": ["rwkv4", "atention"]}, "unknown kind of layer 'atention': did you mean 'attention'?"),
        ({"layers": []}, "num_layers is 2, expected a multiple of the 0 kinds in layers"),
        ({"layers": ["rwkv4"] * 3}, "num_layers is 2, expected a multiple of the 3 kinds in layers"),
        ({"embedding_init": "v4nea"}, "unknown model field embedding_init 'v4nea': did you mean 'v4neo'?"),
        ({"matmul_precision": "hi"}, "unknown model field matmul_precision 'hi'"),
        ({"dim": 0}, "model field dim is 0, expected a positive integer"),
        ({"num_layers": 2.0}, "model field num_layers is 2.0, expected a positive integer"),
    ],
    ids=str,
)
def test_a_misspelt_field_is_named_with_the_nearest_right_one(arguments, line):
    given = {"name": "rwkv4", "vocab_size": V, "num_layers": L, "dim": D} | arguments
    with pytest.raises(ValueError) as error:
        build(**given)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="model field dim is None, expected a positive integer"):
        build("rwkv4", vocab_size=V, num_layers=L)


def test_the_package_offers_what_models_has():
    assert rwkv_jax.build is build and rwkv_jax.stack is stack and rwkv_jax.unstack is unstack
