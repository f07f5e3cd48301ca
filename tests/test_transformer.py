"""The baseline's attention: blocked without a past, over the filled part of a cache with one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import V, forward, made, tokens

from rwkv_jax.models import build
from rwkv_jax.models.transformer import CACHE_BLOCK, QUERY_BLOCK, KVCache, causal_attention, rotate

# ---------------------------------------------------------------------------------------- without a past


def qkv(T, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    return tuple(jnp.asarray(3 * rng.standard_normal((2, T, 3, 4)), dtype) for _ in range(3))


@pytest.mark.parametrize("T", [1, QUERY_BLOCK, QUERY_BLOCK + 1, 300])
def test_blocked_attention_equals_the_library_s(T):
    q, k, v = qkv(T)
    want = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert error_ratio(jax.jit(causal_attention)(q, k, v), want) < 2e-6


def test_masked_attention_equals_the_library_s():
    T = 300
    q, k, v = qkv(T)
    rng = np.random.default_rng(0)
    start_BT = np.maximum.accumulate(np.where(rng.random((2, T)) < 0.02, np.arange(T), 0), axis=1)
    valid_BT = rng.random((2, T)) < 0.8
    s, t = np.arange(T)[None, None], np.arange(T)[None, :, None]
    mask_BTS = (s <= t) & (s >= start_BT[..., None]) & valid_BT[:, None]
    want = jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None])
    out = jax.jit(causal_attention)(q, k, v, start_BT, valid_BT)
    seen = mask_BTS.any(-1)  # a padding token may see nothing
    assert seen.mean() > 0.9 and np.isfinite(out).all()
    assert error_ratio(out[seen], want[seen]) < 2e-6


def test_rotation_is_relative():
    """Scores of rotated queries and keys depend on the distance of their positions only."""
    q, k, _ = (x[:, :1] for x in qkv(1))
    score = lambda at_q, at_k: jnp.einsum(
        "bthk,bthk->bh", rotate(q, jnp.full((2, 1), at_q)), rotate(k, jnp.full((2, 1), at_k))
    )
    np.testing.assert_allclose(score(3, 1), score(1003, 1001), rtol=1e-3, atol=1e-3)
    assert error_ratio(score(3, 1), score(4, 1)) > 0.1
    np.testing.assert_array_equal(rotate(q, jnp.zeros((2, 1))), q)
    # channels 0 and 2 turn by one radian a position, 1 and 3 by 10000^(-1/2)
    one = np.asarray(rotate(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1))))[0, 0, 0]
    angles = np.array([1.0, 0.01])
    want = [*(np.cos(angles) - np.sin(angles)), *(np.cos(angles) + np.sin(angles))]
    np.testing.assert_allclose(one, want, rtol=1e-6)


def squares(program, T):
    """Shapes in a program's text that have two dimensions of T or more."""
    shapes = {tuple(map(int, s.split("x"))) for s in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", program)}
    return {shape for shape in shapes if sum(n >= T for n in shape) > 1}


def test_training_never_holds_a_T_by_T_array():
    T = 1024
    model, params = made("transformer")
    loss = lambda params, ids: jnp.square(model.apply({"params": params}, ids)[0]).mean()
    gradient = jax.jit(jax.value_and_grad(loss)).lower(params, jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert not squares(gradient.as_text(), T)
    assert f"x{QUERY_BLOCK}x{T}xf32" in gradient.as_text()
    library = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True)).lower(*qkv(T))
    assert squares(library.as_text(), T)  # so that the reader above is known to see one


def test_scores_are_recomputed_in_the_backward_pass():
    """What is kept between the passes is linear in T."""
    kept = lambda T: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(causal_attention, *qkv)[1], *qkv(T)))
    )
    assert kept(8 * QUERY_BLOCK) < 12 * kept(QUERY_BLOCK)


# ------------------------------------------------------------------------------------------- with a cache


def decode(model, params, prompt_BT, valid_BT, following_BT, state):
    """Logits of each token of `following`, fed one at a time after a padded prompt."""
    _, state = forward(model, params, prompt_BT, state, None, valid_BT)
    out = []
    for t in range(following_BT.shape[1]):
        logits, state = forward(model, params, following_BT[:, t : t + 1], state)
        out.append(logits[:, 0])
    return np.stack(out, axis=1), state


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shift", [False, True])
def test_ragged_rows_decode_as_if_alone(side, shift):
    model, params = made("transformer", token_shift=shift)
    lengths, width, N = (7, 1, 4), 7, 4
    ids = tokens(3, width + N)
    prompt, valid, following = np.zeros((3, width), np.int32), np.zeros((3, width), bool), np.zeros((3, N), np.int32)
    for b, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        prompt[b, place], valid[b, place], following[b] = ids[b, :n], True, ids[b, n : n + N]
    logits, state = decode(model, params, prompt, valid, following, model.init_state(3, max_length=width + N))
    alone, _ = forward(model, params, ids)
    want = np.stack([alone[b, n : n + N] for b, n in enumerate(lengths)])
    assert error_ratio(logits, want) < 2e-6
    np.testing.assert_array_equal(state[0].cache.length_B, np.add(lengths, N))


def test_the_size_of_the_cache_and_what_lies_in_its_empty_slots_do_not_matter():
    model, params = made("transformer")
    ids = tokens(2, 9)
    valid = np.ones((2, 5), bool)
    small = model.init_state(2, max_length=9)
    large = model.init_state(2, max_length=CACHE_BLOCK + 1)
    assert large[0].cache.k_BHSK.shape[2] == 2 * CACHE_BLOCK

    # finite rubbish in the block that is in use, NaN in the one that is not
    def spoil(x):
        return x.at[:, :, :CACHE_BLOCK].set(1e30).at[:, :, CACHE_BLOCK:].set(jnp.nan) if x.ndim == 4 else x

    states = (small, large, jax.tree.map(spoil, large))
    logits = [decode(model, params, ids[:, :5], valid, ids[:, 5:], state)[0] for state in states]
    assert error_ratio(logits[1], logits[0]) < 2e-6
    np.testing.assert_array_equal(logits[2], logits[1])
    assert error_ratio(logits[0], forward(model, params, ids)[0][:, 5:]) < 2e-6


@pytest.mark.parametrize("larger", [1, 4], ids=["read at once", "read by block"])
def test_a_context_of_several_blocks_equals_a_pass_without_a_cache(larger):
    model, params = made("transformer")
    T = CACHE_BLOCK + 40
    ids = tokens(1, T)
    state = model.init_state(1, max_length=larger * T)
    first, state = forward(model, params, ids[:, :-2], state)
    rest = []
    for t in (T - 2, T - 1):
        logits, state = forward(model, params, ids[:, t : t + 1], state)
        rest.append(logits)
    want, _ = forward(model, params, ids)
    assert error_ratio(jnp.concatenate([first, *rest], axis=1), want) < 2e-6


@pytest.mark.parametrize("T", [1, 2])
def test_only_a_single_token_ever_sees_all_slots_at_once(T):
    """The loop over blocks has a dynamic trip count, and its body sees one block."""
    model, params = made("transformer")
    S = 16 * CACHE_BLOCK
    state = jax.eval_shape(lambda: model.init_state(1, max_length=S))
    program = forward.lower(model, params, jax.ShapeDtypeStruct((1, T), jnp.int32), state).as_text()
    assert f"1x2x{T}x{CACHE_BLOCK}xf32" in program  # scores of one block ...
    assert (f"1x2x{T}x{S}xf32" in program) == (T == 1)  # ... and of all slots


# ------------------------------------------------------------------------------------------------ mistakes


def test_a_cache_needs_a_size():
    with pytest.raises(ValueError, match=r"needs init_state\(batch, max_length=\.\.\.\)"):
        made("transformer")[0].init_state(2)


@pytest.mark.parametrize("head_size", [3, 16])
def test_a_head_size_that_does_not_fit_is_named(head_size):
    model = build("transformer", vocab_size=V, num_layers=1, dim=24, head_size=head_size)
    with pytest.raises(ValueError, match=f"dim is 24 and head_size {head_size}, expected an even head size"):
        jax.eval_shape(model.init, jax.random.key(0), tokens(1, 1))


def test_a_narrow_model_has_one_head():
    state = build("transformer", vocab_size=V, num_layers=1, dim=24).init_state(2, max_length=5)
    assert isinstance(state[0].cache, KVCache) and state[0].cache.k_BHSK.shape == (2, 1, 5, 24)
