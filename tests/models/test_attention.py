"""The baseline's attention: blocked without a past, and over the filled part of a cache."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import V, forward, layer_norm, made, one_by_one, tokens

from rwkv_jax.models import attention, build, unstack
from rwkv_jax.models.attention import CACHE_BLOCK, QUERY_BLOCK, causal_attention, rotate

# ---------------------------------------------------------------------------------------- without a past


def qkv(T, dtype=np.float32):
    rng = np.random.default_rng(T)
    return tuple((3 * rng.standard_normal((2, T, 3, 4))).astype(dtype) for _ in range(3))


def documents(T):
    """(first token of each token's document, whether a token counts, mask of the tokens that each token sees)."""
    rng = np.random.default_rng(0)
    start_BT = np.maximum.accumulate(np.where(rng.random((2, T)) < 0.02, np.arange(T), 0), axis=1)
    valid_BT = rng.random((2, T)) < 0.8
    s, t = np.arange(T)[None, None], np.arange(T)[None, :, None]
    return start_BT, valid_BT, (s <= t) & (s >= start_BT[..., None]) & valid_BT[:, None]


def softmax_attention(q_BTHK, k_BTHK, v_BTHK, seen_BTS):
    """Softmax attention in float64."""
    q, k, v = (np.float64(x) for x in (q_BTHK, k_BTHK, v_BTHK))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(seen_BTS[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weights / np.where(total == 0, 1, total), v)


def test_causal_attention_follows_its_formula_with_and_without_masks():
    """The inputs span two blocks of queries."""
    T = QUERY_BLOCK + 12
    start_BT, valid_BT, seen_BTS = documents(T)
    plain, masked = jax.jit(lambda *x: (causal_attention(*x[:3]), causal_attention(*x)))(*qkv(T), start_BT, valid_BT)
    assert error_ratio(plain, softmax_attention(*qkv(T), np.tri(T, dtype=bool)[None])) < 2e-6
    sees = seen_BTS.any(-1)  # a padding token may see no token
    assert sees.mean() > 0.9 and np.isfinite(masked).all()
    assert error_ratio(np.asarray(masked)[sees], softmax_attention(*qkv(T), seen_BTS)[sees]) < 2e-6


def test_causal_attention_of_bfloat16_has_scores_in_float32():
    """In the program, because XLA leaves out the rounding on a CPU. Gradients keep the dtype of the inputs."""
    arrays = qkv(12, jnp.bfloat16)
    program = str(jax.make_jaxpr(causal_attention)(*arrays))
    assert re.findall(r":(\w+)\[[\d,]*\] = dot_general", program) == ["f32", "bf16"]
    gradients = jax.eval_shape(lambda *qkv: jax.vjp(causal_attention, *qkv)[1](qkv[2]), *arrays)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}


def test_causal_attention_takes_cudnn_for_16_bit_inputs_without_masks_on_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **how: asked.append(how) or q)

    def fused(platform, dtype, *masks, capability=8.0, channels=8):
        asked.clear()
        monkeypatch.setattr(attention, "target_platform", lambda: platform)
        monkeypatch.setattr(attention, "cuda_capability", lambda: capability)
        arrays = (np.resize(x, (*x.shape[:3], channels)).astype(dtype) for x in qkv(4))
        jax.eval_shape(causal_attention.__wrapped__, *arrays, *masks)
        return asked == [{"is_causal": True, "implementation": "cudnn"}]

    start_BT, valid_BT, _ = documents(4)
    assert fused("gpu", jnp.bfloat16) and fused("gpu", np.float16)
    assert not fused("cpu", jnp.bfloat16) and not fused("gpu", np.float32)
    assert not fused("gpu", jnp.bfloat16, start_BT) and not fused("gpu", jnp.bfloat16, None, valid_BT)
    assert not fused("gpu", jnp.bfloat16, capability=7.5) and not fused("gpu", jnp.bfloat16, capability=0.0)  # AMD
    assert not fused("gpu", jnp.bfloat16, channels=12) and not fused("gpu", jnp.bfloat16, channels=136)
    assert fused("gpu", jnp.bfloat16, capability=9.0, channels=144)
    arrays = tuple(np.concatenate([x, x], axis=-1) for x in qkv(4, jnp.bfloat16))
    wanted = causal_attention(*arrays)  # traced for the CPU of a machine with a GPU
    monkeypatch.setattr(attention, "target_platform", lambda: "gpu")
    monkeypatch.setattr(attention, "cuda_capability", lambda: 9.0)
    np.testing.assert_array_equal(jax.jit(causal_attention.__wrapped__)(*arrays), wanted)


def test_rotate_makes_scores_depend_on_distance_only():
    q, k, _ = (x[:, :1] for x in qkv(1))
    turn = jax.jit(lambda x, at: rotate(x, jnp.full(x.shape[:2], at)))
    score = lambda at_q, at_k: np.einsum("bthk,bthk->bh", turn(q, at_q), turn(k, at_k))
    np.testing.assert_allclose(score(3, 1), score(1003, 1001), rtol=1e-3, atol=1e-3)
    assert error_ratio(score(3, 1), score(4, 1)) > 0.1
    np.testing.assert_array_equal(turn(q, 0), q)
    # channels 0 and 2 turn by one radian a position, 1 and 3 by 10000^(-1/2)
    one = np.asarray(turn(np.ones_like(q), 1))[0, 0, 0]
    angles = np.array([1.0, 0.01])
    want = [*(np.cos(angles) - np.sin(angles)), *(np.cos(angles) + np.sin(angles))]
    np.testing.assert_allclose(one, want, rtol=1e-6)


def squares(program, T):
    """Shapes with two dimensions of T or more in a program's text."""
    shapes = {tuple(map(int, s.split("x"))) for s in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", program)}
    return {shape for shape in shapes if sum(n >= T for n in shape) > 1}


def test_transformer_training_holds_no_T_by_T_array():
    T = 2 * QUERY_BLOCK
    model, params = made("transformer")
    loss = lambda params, ids: jnp.square(model.apply({"params": params}, ids)[0]).mean()
    gradient = jax.jit(jax.value_and_grad(loss)).lower(params, jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert not squares(gradient.as_text(), T)
    assert f"x{QUERY_BLOCK}x{T}xf32" in gradient.as_text()
    library = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True)).lower(*qkv(T))
    assert squares(library.as_text(), T)  # proves that `squares` finds one


def test_causal_attention_recomputes_scores_in_the_backward_pass():
    """The arrays kept between the passes are linear in T."""
    kept = lambda T: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(causal_attention, *qkv)[1], *qkv(T)))
    )
    assert kept(3 * QUERY_BLOCK) < 1.5 * 3 * kept(QUERY_BLOCK)


def in_numpy(model, params, ids_BT):
    """Logits [B, T, V] of a transformer in float64. Rotary positions are products of complex numbers."""
    params, (B, T), K = jax.tree.map(np.float64, unstack(params)), ids_BT.shape, model.head_size
    turn_T1i = np.exp(1j * np.arange(T)[:, None, None] * 10000.0 ** (-2 * np.arange(K // 2) / K))
    gelu = lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def mixed(h_BTD, p, name):
        mix_D, previous_BTD = p.get(f"time_mix_{name}", 1), np.pad(h_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return mix_D * h_BTD + (1 - mix_D) * previous_BTD

    def turned(x_BTD):
        a, b = np.moveaxis(x_BTD.reshape(B, T, -1, 2, K // 2), 3, 0)
        return (a + 1j * b) * turn_T1i

    x = layer_norm(params["emb"]["embedding"][ids_BT], params["ln0"])
    for i in range(model.num_layers):
        p = params[f"blocks_{i}"]
        h, att, ffn = layer_norm(x, p["ln1"]), p["att"], p["ffn"]
        q, k, v = (mixed(h, att, n[0]) @ att[n]["kernel"] for n in ("query", "key", "value"))
        scores = np.einsum("bthi,bshi->bhts", turned(q), turned(k).conj()).real / K**0.5
        weights = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhts,bshk->bthk", weights, v.reshape(B, T, -1, K)).reshape(B, T, -1)
        x = x + y @ att["output"]["kernel"]
        x = x + gelu(mixed(layer_norm(x, p["ln2"]), ffn, "k") @ ffn["key"]["kernel"]) @ ffn["value"]["kernel"]
    return layer_norm(x, params["ln_out"]) @ params["head"]["kernel"]


@pytest.mark.parametrize("shift", [False, True])
def test_transformer_follows_its_formula(shift):
    model, params = made("transformer", token_shift=shift)
    ids_BT = tokens(2, 16)
    assert error_ratio(forward(model, params, ids_BT)[0], in_numpy(model, params, ids_BT)) < 2e-6


# ------------------------------------------------------------------------------------------- with a cache

# Three programs: prompts of WIDTH tokens and single tokens with a cache of four blocks, and a pass without a cache.
LENGTHS, WIDTH, N = (7, 1, 4), 152, 4
ROWS, SLOTS = 2 * len(LENGTHS), 4 * CACHE_BLOCK
T = 4 * WIDTH + N


def alone(model, params):
    return np.asarray(forward(model, params, tokens(ROWS, T))[0])


def decode(model, params, prompt_BT, valid_BT, following_BT, state):
    """Logits of each token of `following`, fed one at a time after a padded prompt."""
    _, state = forward(model, params, prompt_BT, state, None, valid_BT)
    return one_by_one(model, params, following_BT, state)


def ragged():
    """(prompts, mask of the tokens that count, continuations): each length padded on the right and on the left."""
    ids = tokens(ROWS, T)
    prompt, valid = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH), bool)
    following = np.zeros((ROWS, N), np.int32)
    for b, n in enumerate(LENGTHS * 2):
        place = slice(0, n) if b < len(LENGTHS) else slice(WIDTH - n, WIDTH)
        prompt[b, place], valid[b, place], following[b] = ids[b, :n], True, ids[b, n : n + N]
    return prompt, valid, following


def spoiled(state, rubbish):
    """The state with `rubbish` in the empty slots of the block in use, and NaN in the unused blocks."""

    def spoil(x):
        if x.ndim != 4:
            return x
        return np.where(np.arange(SLOTS)[:, None] < CACHE_BLOCK, x + np.float32(rubbish), np.float32(np.nan))

    return jax.tree.map(spoil, state)


@pytest.mark.parametrize("shift", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformer_decodes_ragged_rows_as_if_alone_beside_spoiled_slots(shift):
    model, params = made("transformer", token_shift=shift)
    empty = model.init_state(ROWS, max_length=SLOTS)
    logits, state = decode(model, params, *ragged(), empty)
    reference = alone(model, params)
    want = np.stack([reference[b, n : n + N] for b, n in enumerate(LENGTHS * 2)])
    assert error_ratio(logits, want) < 2e-6
    np.testing.assert_array_equal(state[0].cache.length_B, np.add(LENGTHS * 2, N))
    np.testing.assert_array_equal(decode(model, params, *ragged(), spoiled(empty, 1e30))[0], logits)


def test_transformer_context_of_several_blocks_equals_a_pass_without_a_cache():
    """Single tokens first read two blocks of four, one after the other, then three at once."""
    model, params = made("transformer", token_shift=False)
    ids, full = tokens(ROWS, T), np.ones((ROWS, WIDTH), bool)
    state, out, begin = model.init_state(ROWS, max_length=SLOTS), [], 0
    for length in (WIDTH, WIDTH, 1, 1, WIDTH, WIDTH, 1, 1):
        valid = full if length > 1 else None
        logits, state = forward(model, params, ids[:, begin : begin + length], state, None, valid)
        out.append(logits)
        begin += length
    assert begin == T and 2 * WIDTH > CACHE_BLOCK and 4 * WIDTH > 2 * CACHE_BLOCK
    assert error_ratio(np.concatenate(out, axis=1), alone(model, params)) < 2e-6


def test_cached_attention_reads_a_full_cache_once():
    """With room for 10 tokens, tokens 10 and 11 see the first 10, once each."""
    q_BTHK, k_BTHK, v_BTHK = qkv(10)
    k_BHSK, v_BHSK = (x.swapaxes(1, 2) for x in (k_BTHK, v_BTHK))
    cache = attention.KVCache(k_BHSK, v_BHSK, np.array([12, 12]), np.zeros(2, int))
    slots_BT, start_BT = np.array([[10, 11]] * 2), np.zeros((2, 2), int)
    y_BTHK = attention.cached_attention(q_BTHK[:, :2], cache, slots_BT, start_BT)
    sees_all = np.ones((2, 2, 10), bool)
    assert error_ratio(y_BTHK, softmax_attention(q_BTHK[:, :2], k_BTHK, v_BTHK, sees_all)) < 2e-6


def test_transformer_cache_has_whole_blocks_and_a_narrow_model_one_head():
    model = build("transformer", vocab_size=V, num_layers=1, dim=24)
    cache = lambda length: jax.eval_shape(lambda: model.init_state(2, max_length=length))[0].cache.k_BHSK.shape
    slots = {9: 9, CACHE_BLOCK: CACHE_BLOCK, CACHE_BLOCK + 1: 2 * CACHE_BLOCK}
    assert {length: cache(length) for length in slots} == {length: (2, 1, S, 24) for length, S in slots.items()}
    with pytest.raises(ValueError, match=r"needs init_state\(batch, max_length=\.\.\.\)"):
        model.init_state(2)


@pytest.mark.parametrize("head_size", [3, 16])
def test_transformer_names_a_head_size_that_does_not_fit(head_size):
    model = build("transformer", vocab_size=V, num_layers=1, dim=24, head_size=head_size)
    with pytest.raises(ValueError, match=f"dim is 24 and head_size {head_size}, expected an even head size"):
        jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens(1, 1))
