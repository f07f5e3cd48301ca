"""Reading prompts and drawing tokens."""

import functools
import itertools

import jax
import numpy as np
import pytest
from generating import (
    KINDS,
    NEARLY_GREEDY,
    B,
    assert_equal,
    assert_near,
    assert_read,
    case,
    filled,
    ids,
    row,
    unstacked,
    whole,
)
from judge import error_ratio

from rwkv_jax.generate import DISPATCH, PROMPT_CHUNK, generate, generate_with_context, logits, read, sampler
from rwkv_jax.generate.decode import FIRST_CHUNKS, chunks

PROMPTS = [ids(5), ids(16, seed=3), [11]]
FAR = 2 * PROMPT_CHUNK + 5  # read in chunks of 16, 256 and 256
_draws = jax.jit(lambda sampler, logits_TV, key_T: sampler(logits_TV, key_T, None))
_keys = jax.jit(lambda seed, index_T: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_T))


def expected_draws(logits_TV, seed, **settings):
    """The tokens that a sampler draws from the logits of up to 64 tokens, each with its own key."""
    padded = np.zeros((64, logits_TV.shape[1]), np.float32)
    padded[: len(logits_TV)] = logits_TV
    key_T = _keys(np.uint32(seed), np.arange(64, dtype=np.uint32))
    return np.asarray(_draws(sampler(**settings), padded, key_T))[: len(logits_TV)].tolist()


def joined(*lists):
    """Each prompt with its continuation."""
    return [list(itertools.chain(*parts)) for parts in zip(*lists, strict=True)]


def logits_before(kind, prompts, tokens):
    """[T, V] for each row: the logits that its tokens were drawn from, by one pass over prompt and tokens."""
    found, _ = whole(*unstacked(kind), joined(prompts, tokens))
    return [row_TV[len(prompt) - 1 : -1] for row_TV, prompt in zip(found, prompts, strict=True)]


# -------------------------------------------------------------------------------------------------- reading


def test_chunks_hold_the_prompts_in_chunks_of_three_lengths():
    for longest in range(1, 601):
        prompts = [ids(longest), ids(longest // 3, seed=3), ids(max(longest - 256, 0), seed=4)]
        tokens, valid, last = zip(*chunks(prompts), strict=True)
        widths = [x.shape[1] for x in tokens]
        assert widths[0] in FIRST_CHUNKS and set(widths[1:]) <= {PROMPT_CHUNK}
        assert sum(widths[1:]) < longest <= sum(widths)  # the first chunk is needed, and large enough
        shorter = [n for n in FIRST_CHUNKS if n < widths[0]]
        assert not shorter or sum(widths[1:]) + shorter[-1] < longest
        assert list(last) == [False] * (len(widths) - 1) + [True]
        tokens_BT, valid_BT = np.concatenate(tokens, axis=1), np.concatenate(valid, axis=1)
        assert [row_T[valid_T].tolist() for row_T, valid_T in zip(tokens_BT, valid_BT, strict=True)] == prompts
        assert (np.diff(valid_BT.astype(int), axis=1) >= 0).all()  # padding is on the left
    assert list(chunks([[], []])) == []


@KINDS
def test_read_and_logits_equal_one_pass_over_the_prompts(kind):
    """One prompt has chunks that are all padding, one ends a chunk early, one is empty."""
    prompts, texts = [ids(FAR), ids(PROMPT_CHUNK + 5, seed=3), []], [ids(FAR), ids(PROMPT_CHUNK + 5, seed=3), [0]]
    expected, context = whole(*unstacked(kind), texts)
    assert_near(read(*unstacked(kind), prompts), context)
    found, after = logits(*case(kind), prompts)
    assert_near(after, context)
    for actual_TV, expected_TV in zip(found, expected, strict=True):
        assert isinstance(actual_TV, np.ndarray) and actual_TV.dtype == np.float32
        assert error_ratio(actual_TV, expected_TV) < 1e-5
    assert_read(kind, read(*unstacked(kind), ids(1)), ids(1))


@KINDS
def test_read_and_logits_in_parts_equal_one_call(kind):
    """Caches grow between the calls. The given context is unchanged bit for bit, and so is a row with an empty
    part."""
    texts, context = [ids(PROMPT_CHUNK + 30), ids(30, seed=3), ids(12, seed=4)], None
    expected, _ = whole(*unstacked(kind), texts)
    cuts = [(0, 10, 10 + PROMPT_CHUNK, 10 + PROMPT_CHUNK, 30 + PROMPT_CHUNK), (0, 14, 14, 14, 30), (0, 1, 1, 12, 12)]
    for part in range(4):
        ranges = [slice(cut[part], cut[part + 1]) for cut in cuts]
        parts = [text[at] for text, at in zip(texts, ranges, strict=True)]
        before = context and jax.tree.map(np.array, context)  # a view of a buffer would keep it from being recycled
        after = read(*unstacked(kind), parts, context)
        found, same = logits(*unstacked(kind), parts, context)
        assert_near(same, after)
        for b in range(B):
            if parts[b]:
                assert error_ratio(found[b], expected[b][ranges[b]]) < 1e-5
            elif kind != "hybrid":
                assert_equal(row(after, b), row(context, b))
                assert_equal(row(same, b), row(context, b))
        if context:
            assert_equal(context, before)
        context = after
        assert_read(kind, context, *(text[: cut[part + 1]] for text, cut in zip(texts, cuts, strict=True)))


@KINDS
def test_read_and_generate_keep_rows_independent_of_their_neighbours(kind):
    fixed, model = ids(14), unstacked(kind)
    contexts, texts = [], []
    for seed in (3, 4):
        prompts = [ids(16, seed), fixed, ids(9, seed + 9)]
        contexts.append(read(*model, prompts))
        texts.append(generate(*model, prompts, max_new_tokens=40, seed=[1, 5, 2]))
    assert_equal(row(contexts[0], 1), row(contexts[1], 1))
    assert not np.array_equal(contexts[0].logits_BV[0], contexts[1].logits_BV[0])
    assert texts[0][1] == texts[1][1] and texts[0][0] != texts[1][0]


# -------------------------------------------------------------------------------------------------- decoding


@KINDS
def test_generate_draws_every_token_from_the_logits_of_one_full_pass(kind):
    """Each row has its own prompt, seed and limit. The context has read exactly the returned tokens, no stop token.
    For a row that stopped at once it is the previous one, bit for bit."""
    limits = [DISPATCH + 8, 3, 2 * DISPATCH - 4]
    settings = {"max_new_tokens": limits, "seed": [7, 8, 2**32 - 1], "temperature": 2.0}
    tokens, context = generate_with_context(*unstacked(kind), PROMPTS, **settings)
    assert [len(new) for new in tokens] == limits
    for new, logits_TV, seed in zip(tokens, logits_before(kind, PROMPTS, tokens), settings["seed"], strict=True):
        assert new == expected_draws(logits_TV, seed, temperature=2.0)
        assert len(set(new)) > len(new) / 2  # a cycle of few tokens would hide many errors
        assert all(isinstance(token, int) for token in new)
    assert_read(kind, context, *joined(PROMPTS, tokens))

    before, stops = read(*unstacked(kind), PROMPTS), {tokens[1][0], tokens[2][DISPATCH + 9]}
    expected = [next((new[:i] for i, token in enumerate(new) if token in stops), new) for new in tokens]
    assert expected[1] == [] and 0 < len(expected[2]) < limits[2]
    settings |= {"context": before, "stop_tokens": stops}
    tokens, context = generate_with_context(*unstacked(kind), [[]] * B, **settings)
    assert tokens == expected
    assert_read(kind, context, *joined(PROMPTS, tokens))
    assert_equal(row(context, 1), row(before, 1))


def test_generate_at_temperature_0_takes_the_likeliest_tokens():
    greedily = functools.partial(generate, *unstacked("rwkv4"), PROMPTS[0], max_new_tokens=DISPATCH + 8)
    tokens = greedily(temperature=0)
    assert tokens == logits_before("rwkv4", PROMPTS[:1], [tokens])[0].argmax(axis=-1).tolist()
    assert tokens == greedily(**NEARLY_GREEDY)


@KINDS
def test_generate_of_a_batch_equals_single_runs(kind):
    """Stacked and unstacked parameters agree, too. Given a single seed, each row has its own."""
    seeds, limits = [7, 8, 7], [DISPATCH + 8, 3, DISPATCH + 8]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    together = generate(*unstacked(kind), prompts, seed=seeds, max_new_tokens=limits)
    for new, prompt, seed, limit in zip(together, prompts, seeds, limits, strict=True):
        assert new == generate(*case(kind), np.array(prompt, np.uint16), seed=seed, max_new_tokens=limit)
    assert together[0] == together[2]
    of_one_seed = generate(*unstacked(kind), np.array([PROMPTS[0]] * B), seed=7, max_new_tokens=DISPATCH + 8)
    assert of_one_seed[0] == together[0] and len({tuple(new) for new in of_one_seed}) == B


@KINDS
def test_generate_continues_and_forks_a_context(kind):
    """Continuations equal one longer run, any number of times. With no new tokens the context is unchanged."""
    expected = generate(*unstacked(kind), PROMPTS[0], max_new_tokens=50, seed=7)
    first, context = generate_with_context(*unstacked(kind), PROMPTS[0], max_new_tokens=10, seed=7)
    before = jax.tree.map(np.array, context)
    more = functools.partial(generate_with_context, *unstacked(kind), [], context=context, seed=7)
    for _ in range(2):
        assert first + more(max_new_tokens=40, start=10)[0] == expected
        assert first + more(max_new_tokens=40)[0] != expected
    assert_equal(context, before)
    assert_equal(more(max_new_tokens=0), ([], before))


def test_generate_grows_the_caches_of_attention(monkeypatch):
    """The prompts fill a cache that is too short for the continuations; a longer cache is read further."""
    monkeypatch.setattr("rwkv_jax.generate.decode.LIKELY", 1)
    model, prompts, limits = unstacked("hybrid"), [ids(PROMPT_CHUNK - 2), ids(40, seed=3), [0]], [DISPATCH + 8, 5, 0]
    short = read(*model, prompts)
    tokens, context = generate_with_context(*model, prompts, max_new_tokens=limits, **NEARLY_GREEDY)
    slots = lambda context: context.state[1].cache.k_BHSK.shape[2]
    assert (slots(short), slots(context)) == (256, 512)
    for new, logits_TV, limit in zip(tokens, logits_before("hybrid", prompts, tokens), limits, strict=True):
        assert new == logits_TV.argmax(axis=-1).tolist() and len(new) == limit
    assert_read("hybrid", short, *prompts)
    assert_read("hybrid", context, *joined(prompts, tokens))
    more = [ids(3, seed=8), [], ids(16, seed=9)]
    after = read(*model, more, context)
    assert_read("hybrid", after, *joined(prompts, tokens, more))
    assert_equal(row(after, 1), row(context, 1))


def test_generate_reads_an_empty_prompt_as_the_separator():
    assert generate(*unstacked("rwkv4"), [], seed=7) == generate(*unstacked("rwkv4"), [0], seed=7)
    settings = {"max_new_tokens": 9} | NEARLY_GREEDY
    rows = generate(*unstacked("rwkv4"), np.zeros((B, 0), int), **settings)
    assert rows == [generate(*unstacked("rwkv4"), [0], **settings)] * B


def test_generate_penalises_tokens_of_prompt_and_continuation():
    draw = functools.partial(generate, *unstacked("rwkv4"), PROMPTS[0], max_new_tokens=40, temperature=1e-4)
    assert len(set(draw(presence_penalty=1000.0, repetition_penalty=1.0001))) == 40
    penalised = draw(presence_penalty=1e-5, repetition_penalty=1000.0)
    assert len(set(penalised) - set(PROMPTS[0])) == 40
    assert len(set(draw())) < 40


def test_generate_takes_any_function_as_sampler():
    tokens = generate(*unstacked("rwkv4"), ids(5), max_new_tokens=3, sampler=lambda x, key, history: x.argmin(-1))
    assert tokens == logits_before("rwkv4", [ids(5)], [tokens])[0].argmin(axis=-1).tolist()


def test_generate_names_a_row_with_no_token_to_draw():
    context = filled("rwkv4", B)
    context.logits_BV[1] = np.nan
    with pytest.raises(ValueError, match="row 1 has no token to draw: all are banned, or its logits are not finite"):
        generate(*unstacked("rwkv4"), [[]] * B, context=context)


def test_generate_names_mistakes_before_it_computes():
    for change, message in (
        ({"prompt_ids": [1, 256]}, "holds token 256, expected ids from 0 to 255"),
        ({"prompt_ids": [[1], [-1]]}, "holds token -1"),
        ({"prompt_ids": "abc"}, "expected ids"),
        ({"prompt_ids": [0.5]}, "expected ids"),
        ({"prompt_ids": np.zeros((0, 3), int)}, "expected ids"),
        ({"prompt_ids": np.zeros((1, 3, 3), int)}, "expected ids"),
        ({"top_p": 0}, "top_p is 0, expected"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": [1, 2]}, "one for each of 1 prompts"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"start": -1}, "start is -1"),
        ({"stop_tokens": 256}, "stop_tokens holds token 256"),
        ({"stop_tokens": [1.5]}, "stop_tokens is float64"),
        ({"penalty_decay": 2, "presence_penalty": 1.0}, "decay of penalties is 2"),
        ({"logit_bias": {256: 1.0}}, "logit_bias names token 256"),
        ({"sampler": sampler(), "top_p": 0.5}, "both a sampler and top_p"),
        ({"context": filled("rwkv4", 2)}, "the context holds 2 texts, expected one for each of the 1 prompts"),
        ({"context": filled("hybrid", 1)}, "not one of this model"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*unstacked("rwkv4"), **{"prompt_ids": [1]} | change)
