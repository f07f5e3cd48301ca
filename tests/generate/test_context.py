"""Contexts as values: copies, rows, and room in caches."""

import jax
import numpy as np
import pytest
from generating import assert_equal, filled, row, unstacked

from rwkv_jax.generate import Context, concatenate, rows
from rwkv_jax.generate.context import begin, with_room

BOTH = pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])
slots = lambda context: context.state[1].cache.k_BHSK.shape[2]


@BOTH
def test_rows_and_concatenate_pick_and_join_texts(kind):
    together = filled(kind, 3)
    for index, expected in ((-1, [2]), (slice(1, None), [1, 2]), ([2, 0, 0], [2, 0, 0])):
        assert_equal(rows(together, index), jax.tree.map(lambda x, at=expected: x[np.array(at)], together))
    assert_equal(concatenate([row(together, b) for b in range(3)]), together)
    with pytest.raises(IndexError):
        rows(together, 3)
    with pytest.raises(ValueError, match="no contexts"):
        concatenate([])
    with pytest.raises(ValueError, match="different models"):
        concatenate([together, filled("hybrid" if kind == "rwkv4" else "rwkv4", 1)])


def assert_filled_up(actual, expected):
    """Check that two contexts of a hybrid are equal up to zeros after the caches of the first."""
    (recurrent, attention), (_, before) = actual.state, expected.state
    for name in ("k_BHSK", "v_BHSK"):
        longer, shorter = (np.asarray(getattr(entry.cache, name)) for entry in (attention, before))
        np.testing.assert_array_equal(longer[:, :, : shorter.shape[2]], shorter)
        assert not longer[:, :, shorter.shape[2] :].any()
    attention = attention._replace(cache=before.cache._replace(length_B=attention.cache.length_B))
    assert_equal(Context((recurrent, attention), actual.logits_BV), expected)


def test_concatenate_fills_up_shorter_caches():
    long, short = filled("hybrid", 1, room=300, seed=1), filled("hybrid", 2)
    both = concatenate([short, long])
    assert slots(both) == 512
    assert_equal(row(both, 2), long)
    assert_filled_up(jax.tree.map(lambda x: x[:2], both), short)


def test_begin_copies_a_context_and_makes_room_for_new_tokens():
    for kind in ("rwkv4", "hybrid"):
        model, context = unstacked(kind)[0], filled(kind, 3)
        assert_equal(begin(model, context, 3, 200), context)
        assert {len(leaf) for leaf in jax.tree.leaves(begin(model, None, 3, 200))} == {3}
        with pytest.raises(ValueError, match="the context holds 3 texts, expected one for each of the 2 prompts"):
            begin(model, context, 2, 1)
    assert [slots(begin(model, None, 3, room)) for room in (1, 256, 257, 600)] == [256, 256, 512, 768]


def test_with_room_grows_caches_up_to_the_likely_length():
    """If the tokens fit, nothing is copied. Otherwise caches double, up to the length that is likely to be needed."""
    model, rwkv4 = unstacked("hybrid")[0], filled("rwkv4", 3)
    assert with_room(unstacked("rwkv4")[0], rwkv4, 10_000, 10_000) is rwkv4
    for length, room, likely, before, after in (
        (200, 56, 1000, 256, 256),
        (200, 57, 57, 256, 512),
        (200, 57, 10_000, 256, 512),
        (200, 400, 400, 256, 768),
        (500, 32, 10_000, 512, 1024),
        (500, 32, 200, 512, 768),
    ):
        context = filled("hybrid", 3, room=before)
        context.state[1].cache.length_B[:] = length, 3, 7
        grown = with_room(model, context, room, likely)
        assert slots(context) == before and slots(grown) == after
        assert (grown is context) == (before == after)
        assert_filled_up(grown, context)
