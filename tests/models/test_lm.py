"""Every model behind one signature: RWKV-4, the transformer, the LSTM and hybrids."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import assert_same, error_ratio
from operators import masks_of
from small import KINDS, D, L, V, forward, made, make, one_by_one, shapes_of, tokens

from rwkv_jax import generate
from rwkv_jax.models import build, kind_of, parameter_shapes, stack, unstack

PURE = [kind for kind in KINDS if not kind.startswith("hybrid")]
AND_SLOWLY = lambda *fast: [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
B, T = 12, 16  # one shape in nearly all tests, so that they share one compiled program
NONE, ALL = np.zeros((B, T), bool), np.ones((B, T), bool)


# --------------------------------------------------------------------------------------------- parameters


def test_lm_names_stacked_parameters_of_another_number_of_layers():
    """Un-jitted calls and decoding take the stack apart, and would otherwise ignore an extra layer silently."""
    model, params = made("rwkv4")
    deeper = jax.tree.map(lambda x: np.concatenate([x, x]), params["blocks"])
    shorter = jax.tree.map(np.copy, params["blocks"])
    shorter["att"]["time_decay"] = shorter["att"]["time_decay"][:1]
    for blocks, named in ((deeper, "att/key/kernel"), (shorter, "att/time_decay")):
        line = rf"blocks/{named} is \(.*\), expected {L} layers of it"
        with pytest.raises(ValueError, match=line):
            model.apply({"params": params | {"blocks": blocks}}, tokens(1, 2))
        with pytest.raises(ValueError, match=line):
            generate.read(model, params | {"blocks": blocks}, [[1]])


@pytest.mark.parametrize("scan", [True, False])
def test_lm_names_a_vector_of_another_shape(scan):
    """A vector of one number would otherwise be broadcast silently."""
    _, params = made("rwkv4")
    one = lambda path, x: x[..., :1] if path[-1].key == "time_mix_k" else x
    params = jax.tree_util.tree_map_with_path(one, params)
    call = functools.partial(forward, make("rwkv4", scan=scan))
    with pytest.raises(ValueError, match=re.escape(f"att/time_mix_k is (1,), expected ({D},)")):
        jax.eval_shape(call, params if scan else unstack(params), tokens(1, 1))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", ["rwkv4", "rwkv7", "hybrid"])
def test_lm_names_a_state_that_does_not_fit(kind, scan):
    """An extra layer would otherwise be ignored silently, if each layer has parameters of its own."""
    model = make(kind, scan=scan)
    call = lambda state: jax.eval_shape(functools.partial(forward, model), shapes_of(model), tokens(1, 3), state)
    made_of = lambda model, B: jax.eval_shape(lambda: model.init_state(B, max_length=8))
    fits, other, batch = made_of(model, 1), made_of(make("lstm"), 1), made_of(model, 2)
    with pytest.raises(ValueError, match=f"the state has {len(fits) + 1} layers, expected {len(fits)}"):
        call((*fits, fits[-1]))
    with pytest.raises(ValueError, match=f"the state has {len(fits) - 1} layers, expected {len(fits)}"):
        call(fits[:-1])
    for wrong in (other[0], batch[0]):
        with pytest.raises(ValueError, match=r"the state of layer 0, rwkv\d, has arrays .*, expected \(1, 8\)"):
            call((wrong, *fits[1:]))
    call(fits)


TABLE_2 = {
    "169m": 169_342_464,
    "430m": 430_397_440,
    "1b5": 1_515_106_304,
    "3b": 2_984_627_200,
    "7b": 7_392_649_216,
    "14b": 14_148_597_760,
}


# RWKV-5 from 0.4b and RWKV-6 to 3b: as printed in arXiv:2404.05892, Table 11. RWKV-7: the formula in RWKV-LM's README,
# without the unused v0, v1, v2 of the first layer. The names of files round theirs: RWKV-x060-173m-pile,
# RWKV-x070-Pile-421M (842 MB in bfloat16), RWKV-x060-World-14B.
RELEASED = {
    "rwkv4": TABLE_2,
    "rwkv5": {
        "0.1b": 192_807_936,
        "0.4b": 461_721_600,
        "1.5b": 1_577_754_624,
        "3b": 3_062_999_040,
        "7b": 7_518_044_160,
    },
    "rwkv6": {
        "1.6b": 1_599_873_024,
        "3b": 3_099_863_040,
        "7b": 7_635_746_816,
        "14b": 14_069_088_256,
        "173m": 173_558_784,
    },
    "rwkv7": {
        "0.1b": 191_034_624,
        "0.4b": 450_767_872,
        "1.5b": 1_527_404_544,
        "2.9b": 2_947_735_040,
        "7.2b": 7_199_141_888,
        "169m": 167_638_272,
        "421m": 421_080_064,
        "1b5": 1_465_014_272,
    },
}


@pytest.mark.parametrize("kind", RELEASED)
def test_lm_released_sizes_have_the_parameters_of_the_papers(kind):
    shapes = {size: parameter_shapes(build(kind, size=size)) for size in kind_of(kind).sizes}
    assert {size: sum(x.size for x in jax.tree.leaves(its)) for size, its in shapes.items()} == RELEASED[kind]


@pytest.mark.parametrize("kind", ["rwkv4", "transformer", "hybrid"])
def test_lm_layers_have_13_D2_of_matrices(kind):
    model, params = made(kind)
    layers = [v for k, v in unstack(params).items() if k.startswith("blocks_")]
    for layer in layers:
        assert sum(x.size for x in jax.tree.leaves(layer) if x.ndim == 2) == 13 * D**2
    assert len(layers) == model.num_layers


@pytest.mark.parametrize("kind", KINDS)
def test_stack_and_unstack_are_inverse(kind):
    model, params = made(kind)
    layers = unstack(params)
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert spec(shapes_of(make(kind, scan=False))) == spec(layers)
    stacked = jax.jit(stack, static_argnames=("period", "apart"))(
        layers, period=len(model.layers), apart=model.layers_apart
    )
    jax.tree.map(np.testing.assert_array_equal, stacked, params)


# ---------------------------------------------------------------------------------------- one computation


@pytest.mark.parametrize("kind", AND_SLOWLY(*(KINDS.keys() - {"rwkv5"})))  # rwkv6 covers the code of rwkv5
def test_lm_without_masks_or_a_past_equals_empty_masks_and_an_empty_past(kind):
    """Stacked layers: without a past, after an empty past, and with masks that mask no token."""
    model, params = made(kind)
    ids, empty = tokens(B, T), model.init_state(B, max_length=T)
    before = jax.tree.map(np.array, empty)
    logits, fresh = forward(model, params, ids)
    assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
    masked, state = forward(model, params, ids, empty, NONE, ALL)
    assert_same(masked, logits)
    jax.tree.map(np.testing.assert_array_equal, empty, before)  # a call leaves its state unchanged
    # no past given: a full state from RWKV, no cache from attention
    assert [entry is None for entry in fresh] == [kind.cached is not None for _, kind, _ in model.every_layer]
    if model.recurrent:
        assert_same(fresh, state)
    else:  # it would forget the prompt without a word
        with pytest.raises(ValueError, match=r"the state of layer \d, attention, has no cache: begin from init_state"):
            forward(model, params, ids, fresh)
    spec = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert spec(empty) == spec(state) == spec(make(kind, scan=False).init_state(B, T))
    own = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(make(kind, scan=False).init_state(B, T))]
    assert len(set(own)) == len(own)  # no two leaves share a buffer, so that all can be donated
    assert isinstance(state, tuple) and len(state) == model.num_layers
    assert all(x.shape[0] == B and x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", AND_SLOWLY("rwkv4", "hybrid"))
def test_lm_token_by_token_equals_parallel(kind):
    """Uses one set of parameters for each layer, with the state carried from token to token."""
    model, params = made(kind)
    unrolled, layers = make(kind, scan=False), unstack(params)
    ids = tokens(B, T)
    logits, stacked_state = forward(model, params, ids, model.init_state(B, max_length=T), NONE, ALL)
    steps, state = one_by_one(unrolled, layers, ids, unrolled.init_state(B, max_length=T))
    assert_same(steps, logits)
    assert_same(state, stacked_state)


@pytest.mark.parametrize("kind", PURE)
def test_lm_in_bfloat16_has_logits_and_state_in_float32(kind):
    model = make(kind, dtype="bfloat16")
    state = jax.eval_shape(lambda: model.init_state(B, max_length=T))
    logits, after = jax.eval_shape(functools.partial(forward, model), shapes_of(model), tokens(B, T), state)
    assert logits.dtype == jnp.float32
    is_cache = lambda path: any(getattr(entry, "name", "").startswith(("k_", "v_")) for entry in path)
    for path, x in jax.tree_util.tree_leaves_with_path((state, after)):
        expected = (jnp.bfloat16,) if is_cache(path) else (jnp.float32, jnp.int32)
        assert x.dtype in expected, path


@pytest.mark.parametrize("kind", KINDS)
def test_lm_takes_no_tokens(kind):
    model = make(kind)
    for state in (None, jax.eval_shape(lambda: model.init_state(B, max_length=T))):
        logits, after = jax.eval_shape(functools.partial(forward, model), shapes_of(model), tokens(B, 0), state)
        assert logits.shape == (B, 0, V)
        assert state is None or after == state


@pytest.mark.parametrize("kind", PURE)
def test_lm_state_keeps_its_dtype_with_wider_parameters(kind, x64):
    model = make(kind, param_dtype="float64")
    state = jax.eval_shape(lambda: model.init_state(B, max_length=T))
    _, after = jax.eval_shape(functools.partial(forward, model), shapes_of(model), tokens(B, T), state)
    assert after == state


@pytest.mark.parametrize("kind", PURE)
def test_lm_in_bfloat16_has_statistics_of_norms_in_float32(kind):
    model = make(kind, dtype="bfloat16")
    program = str(jax.make_jaxpr(functools.partial(forward, model))(shapes_of(model), tokens(B, T)))
    assert set(re.findall(r":(\w+)\[[\d,]*\] = rsqrt", program)) == {"f32"}


@pytest.mark.parametrize("kind", ["rwkv4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in PURE[1:])])
def test_lm_in_bfloat16_rounds_activations_and_not_logits(kind):
    _, params = made(kind)
    logits, _ = forward(make(kind, dtype="bfloat16"), params, tokens(B, T))
    exact, _ = forward(make(kind), params, tokens(B, T))
    # about 20 roundings of 2^-9 in a row, and twice as many in RWKV-7, whose gates and low-rank maps are in a row too
    assert 1e-4 < error_ratio(logits, exact) < (0.08 if kind == "rwkv7" else 0.04)
    # the logits themselves are not rounded
    assert np.any(np.asarray(logits) != np.asarray(logits).astype(jnp.bfloat16).astype(np.float32))


# ------------------------------------------------------------------------- documents, padding, causality

LAYOUTS = ("..abcd.AbcdAb.cd", "AbcdAb.cd..Abcd.", "ab.cdAbcdAbcd...")


def padded(*rows):
    """(tokens, masks) of rows of B x T, padded on the right."""
    ids, valid = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)], valid[b, : len(row)] = row, True
    return ids, NONE, valid


@pytest.mark.parametrize("kind", PURE)
def test_lm_packed_documents_equal_separate_rows(kind):
    model, params = made(kind)
    rows, N, P = len(LAYOUTS), 4, 2  # tokens of a document, three of them a row; tokens before and after the row
    reset_BT, valid_BT = masks_of(LAYOUTS).values()
    documents, past, following = tokens(rows, 3, N), tokens(rows, P, seed=1), tokens(rows, P, seed=2)
    packed = np.full(valid_BT.shape, V - 1, np.int32)
    packed[valid_BT] = documents.reshape(-1)

    def call(state, ids, reset, valid):
        logits, state = forward(model, params, ids, state, reset, valid)
        return np.array(logits), state

    def filled(ids, reset, valid):
        return tuple(np.concatenate([x, np.zeros((B - rows, T), x.dtype)]) for x in (ids, reset, valid))

    alone, _ = call(None, *padded(*documents.reshape(-1, N)))
    alone = alone[: rows * 3, :N].reshape(rows, 3, N, V)
    continued = np.concatenate([past, documents[:, 0]], axis=1)
    followed = np.concatenate([documents[:, 2], following], axis=1)
    apart, _ = call(None, *padded(*continued, *followed))
    logits, _ = call(None, *filled(packed, reset_BT, valid_BT))
    assert_same(logits[:rows][valid_BT].reshape(alone.shape), alone)

    # after a past, which the first document continues where no reset is set; then the last one is continued
    _, state = call(model.init_state(B, max_length=P + 3 * N + P), *padded(*past))
    logits, state = call(state, *filled(packed, reset_BT, valid_BT))
    continues_B = [row.lstrip(".")[0].islower() for row in LAYOUTS]
    assert continues_B == [True, False, True]
    alone[continues_B, 0] = apart[:rows][continues_B, P : P + N]
    assert_same(logits[:rows][valid_BT].reshape(alone.shape), alone)
    logits, _ = call(state, *padded(*following))
    assert_same(logits[:rows, :P], apart[rows : 2 * rows, N : N + P])


CAUSAL = "ab.cAbc.dA.b"  # B tokens


@pytest.mark.parametrize("kind", PURE)
def test_lm_logits_depend_on_the_past_of_their_own_document_only(kind):
    """Row s has another token s: the logits of all tokens that must not see it are bit-equal."""
    model, params = made(kind)
    reset_BT, valid_BT = masks_of([CAUSAL + "." * (T - B)] * B).values()
    ids = np.repeat(tokens(1, T), B, axis=0)
    other = ids.copy()
    other[np.arange(B), np.arange(B)] = (ids[0, :B] + 1) % V
    run = lambda ids: np.asarray(forward(model, params, ids, None, reset_BT, valid_BT)[0])
    changed_TS = (run(ids) != run(other)).any(-1)[:, :B].T

    valid_T, t, s = valid_BT[0, :B], np.arange(B)[:, None], np.arange(B)[None]
    document_T = np.cumsum((reset_BT & valid_BT)[0, :B])
    sees_TS = (s <= t) & (document_T[:, None] == document_T[None]) & valid_T[None]
    np.testing.assert_array_equal(changed_TS[valid_T], sees_TS[valid_T])  # the logits of padding are undefined
