"""Contexts as values: copies, rows, and room in caches."""

import jax
import numpy as np
import pytest
from generating import KINDS, NEARLY_GREEDY, assert_equal, assert_read, filled, ids, row, unstacked

from rwkv_jax.generate import Context, concatenate, generate, generate_with_context, read, rows
from rwkv_jax.generate.context import begin, with_room

BOTH = pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])
slots = lambda context: context.state[1].cache.k_BHSK.shape[2]


def with_cache(context, **changes):
    """The context of a hybrid with another cache."""
    recurrent, attention = context.state
    return Context((recurrent, attention._replace(cache=attention.cache._replace(**changes))), context.logits_BV)


def of_length(*lengths):
    return {"length_B": np.array(lengths, np.int32)}


@KINDS
def test_forks_of_a_context_are_independent(kind):
    prompt = ids(5)
    context = read(*unstacked(kind), prompt)
    going = lambda more: generate_with_context(*unstacked(kind), more, context=context, max_new_tokens=40, seed=1)
    alone = going(ids(7, seed=4))
    other = going(ids(16, seed=5))
    again = going(ids(7, seed=4))
    assert alone[0] == again[0] != other[0]
    assert_equal(alone[1], again[1])
    assert_equal(context, read(*unstacked(kind), prompt))
    assert_read(kind, alone[1], prompt + ids(7, seed=4) + alone[0])


@KINDS
def test_generate_of_no_tokens_equals_read(kind):
    prompts = [ids(5), ids(3), ids(1)]
    tokens, context = generate_with_context(*unstacked(kind), prompts, max_new_tokens=0)
    assert tokens == [[], [], []]
    assert_equal(context.logits_BV, read(*unstacked(kind), prompts).logits_BV)


@BOTH
def test_rows_and_concatenate_pick_and_join_texts(kind):
    together = filled(kind, 3)
    for index, expected in ((1, [1]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 0, 0], [2, 0, 0])):
        assert_equal(rows(together, index), jax.tree.map(lambda x, at=expected: x[np.array(at)], together))
    assert_equal(concatenate([row(together, b) for b in range(3)]), together)
    with pytest.raises(IndexError):
        rows(together, 3)
    with pytest.raises(ValueError, match="no contexts"):
        concatenate([])
    with pytest.raises(ValueError, match="different models"):
        concatenate([together, filled("hybrid" if kind == "rwkv4" else "rwkv4", 1)])


def test_concatenate_fills_up_shorter_caches():
    long, short = filled("hybrid", 1, room=300, seed=1), filled("hybrid", 2)
    both = concatenate([short, long])
    assert slots(both) == 512
    assert_equal(row(both, 2), long)
    cache, expected = both.state[1].cache, short.state[1].cache
    np.testing.assert_array_equal(cache.k_BHSK[:2, :, :256], expected.k_BHSK)
    np.testing.assert_array_equal(cache.v_BHSK[:2, :, :256], expected.v_BHSK)
    assert not np.any(np.asarray(cache.k_BHSK)[:2, :, 256:])


@pytest.mark.parametrize("kind", ["rwkv4", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_concatenated_contexts_continue_as_single_ones(kind):
    texts = [ids(3), ids(260, seed=3), ids(5, seed=4)]
    contexts = [read(*unstacked(kind), text) for text in texts]
    more, settings = [[], [1], ids(4)], {"max_new_tokens": 20} | NEARLY_GREEDY
    tokens, after = generate_with_context(*unstacked(kind), more, context=concatenate(contexts), **settings)
    assert_read(kind, after, *(a + b + c for a, b, c in zip(texts, more, tokens, strict=True)))
    for prompt, new, context in zip(more, tokens, contexts, strict=True):
        assert new == generate(*unstacked(kind), prompt, context=context, **settings)


def test_begin_copies_a_context_and_makes_room_for_what_is_read():
    for kind in ("rwkv4", "hybrid"):
        model, context = unstacked(kind)[0], filled(kind, 3)
        assert_equal(begin(model, context, 3, 200), context)
        for leaf in jax.tree.leaves(begin(model, None, 3, 200)):
            assert len(leaf) == 3
        with pytest.raises(ValueError, match="the context holds 3 texts, expected one for each of the 2 prompts"):
            begin(model, context, 2, 1)
    model = unstacked("hybrid")[0]
    assert [slots(begin(model, None, 3, room)) for room in (1, 256, 257, 600)] == [256, 256, 512, 768]


def test_with_room_grows_caches_to_what_is_likely():
    """Where the tokens fit nothing is copied; else caches double, but to no more than what is likely to be needed."""
    model = unstacked("hybrid")[0]
    context = with_cache(filled("hybrid", 3), **of_length(200, 3, 7))
    assert with_room(model, context, 56, 1000) is context
    for room, likely, expected in ((57, 57, 512), (57, 10_000, 512), (400, 400, 768), (1, 1, 256), (300, 900, 512)):
        grown = with_room(model, context, room, likely)
        assert slots(grown) == expected
        old, new = context.state[1].cache, grown.state[1].cache
        np.testing.assert_array_equal(new.length_B, old.length_B)
        for before, after in ((old.k_BHSK, new.k_BHSK), (old.v_BHSK, new.v_BHSK)):
            np.testing.assert_array_equal(np.asarray(after)[:, :, :256], before)
            assert not np.any(np.asarray(after)[:, :, 256:])
        assert_equal(Context(grown.state[0], grown.logits_BV), Context(context.state[0], context.logits_BV))
    context = with_cache(filled("hybrid", 3, room=512), **of_length(500, 3, 7))
    assert slots(with_room(model, context, 32, 10_000)) == 1024
    assert slots(with_room(model, context, 32, 200)) == 768
    rwkv4 = filled("rwkv4", 3)
    assert with_room(unstacked("rwkv4")[0], rwkv4, 10_000, 10_000) is rwkv4
