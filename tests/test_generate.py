"""Reading prompts and drawing tokens."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generating import KINDS, case, ids, unstacked
from judge import error_ratio
from small import forward

import rwkv_jax
from rwkv_jax.generate import (
    DISPATCH,
    PROMPT_CHUNK,
    generate,
    generate_with_context,
    read,
    rows,
    sampler,
    stream,
)
from rwkv_jax.tokenizers import ByteTokenizer

GREEDY = {"temperature": 0}
assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def assert_near(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and error_ratio(a, b) < 1e-5


# -------------------------------------------------------------------------------------------------- reading


@KINDS
@pytest.mark.parametrize("length", [1, PROMPT_CHUNK, 2 * PROMPT_CHUNK + 40])
def test_reading_is_one_pass_over_the_prompt(kind, length):
    model, params = case(kind)
    tokens_BT = np.array([ids(length), ids(length, seed=3)])
    context = read(model, params, tokens_BT)
    slots = 256 * -(-length // 256)
    whole = jax.jit(lambda state: model.apply({"params": params}, tokens_BT, state))
    expected_BTV, expected_state = whole(model.init_state(2, slots))
    assert_near((context.logits_BV, context.state), (expected_BTV[:, -1], expected_state))


@KINDS
def test_prompts_of_different_lengths(kind):
    """One of them has chunks that are all padding, one ends a chunk early, one is empty."""
    prompts = [ids(3), ids(2 * PROMPT_CHUNK + 5, seed=3), ids(PROMPT_CHUNK + 5, seed=4), []]
    together = read(*unstacked(kind), prompts)
    for b, prompt in enumerate(prompts):
        alone = read(*unstacked(kind), prompt)
        assert error_ratio(rows(together, b).logits_BV, alone.logits_BV) < 1e-5
        more = [read(*unstacked(kind), [7, 8], context).logits_BV for context in (rows(together, b), alone)]
        assert error_ratio(*more) < 1e-5


@KINDS
def test_a_row_does_not_know_its_neighbours(kind):
    fixed, model = ids(20), unstacked(kind)
    first, second = (read(*model, [ids(30, seed), fixed, ids(17, seed + 9)]) for seed in (3, 4))
    assert_equal(rows(first, 1), rows(second, 1))
    assert not np.array_equal(first.logits_BV[0], second.logits_BV[0])
    settings = {"max_new_tokens": 40, "seed": [1, 5, 2]}
    texts = [generate(*model, [ids(30, seed), fixed, ids(17, seed + 9)], **settings) for seed in (3, 4)]
    assert texts[0][1] == texts[1][1] and texts[0][0] != texts[1][0]


def test_reading_leaves_the_context_it_is_given():
    context = read(*unstacked("hybrid"), ids(20))
    before = jax.tree.map(np.array, context)  # copies: a view of a buffer would keep it from being recycled
    first, second = (read(*unstacked("hybrid"), [7, 8], context) for _ in range(2))
    drawn = [generate(*unstacked("hybrid"), [], context=context, max_new_tokens=9) for _ in range(2)]
    assert_equal(first, second)
    assert_equal(before, context)
    assert drawn[0] == drawn[1]
    assert error_ratio(first.logits_BV, read(*unstacked("hybrid"), [*ids(20), 7, 8]).logits_BV) < 1e-5


@KINDS
def test_reading_by_parts_is_reading_at_once(kind):
    """Caches grow on the way."""
    text, context = ids(2 * PROMPT_CHUNK + 100), None
    for part in (text[:10], text[10:300], [], text[300:]):
        context = read(*unstacked(kind), part, context)
    assert error_ratio(context.logits_BV, read(*unstacked(kind), text).logits_BV) < 1e-5


@KINDS
def test_an_empty_prompt_leaves_its_row_as_it_is(kind):
    context = read(*unstacked(kind), [ids(20), ids(20, seed=3)])
    after = read(*unstacked(kind), [[7, 8], []], context)
    assert_equal(rows(after, 1), rows(context, 1))
    assert_near(rows(after, 0), read(*unstacked(kind), [7, 8], rows(context, 0)))


# -------------------------------------------------------------------------------------------------- decoding


@KINDS
def test_each_token_follows_from_one_full_pass(kind):
    model, params = case(kind)
    prompt, num_new = ids(5), DISPATCH + 8
    logits = lambda tokens: forward(model, params, np.array([prompt + tokens[:-1]]))[0][0, len(prompt) - 1 :]

    tokens = generate(model, params, prompt, max_new_tokens=num_new, **GREEDY)
    assert tokens == logits(tokens).argmax(-1).tolist()

    # greedy text goes in circles, so drawn text as well
    tokens = generate(model, params, prompt, max_new_tokens=num_new, temperature=2.0, seed=7)
    key_T = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(num_new))
    assert tokens == sampler(temperature=2.0)(logits(tokens), key_T, None).tolist()
    assert len(set(tokens)) > num_new / 2


@KINDS
def test_layouts_of_the_parameters_and_batches_agree(kind):
    one = generate(*case(kind), ids(5), max_new_tokens=20, seed=7)
    assert one == generate(*unstacked(kind), np.array(ids(5), np.uint16), max_new_tokens=20, seed=7)
    batch = np.array([ids(5), ids(5, seed=3)])
    for row, tokens in zip(batch, generate(*unstacked(kind), batch, max_new_tokens=20, **GREEDY), strict=True):
        assert tokens == generate(*unstacked(kind), row, max_new_tokens=20, **GREEDY)


@KINDS
def test_a_row_is_its_single_run(kind):
    """Each with its own prompt, seed and limit; a batch of one seed has a seed for every row."""
    prompts, seeds, limits = [ids(5), ids(40, seed=3), ids(5), ids(5)], [7, 8, 7, 9], [50, 3, 50, 20]
    together, context = generate_with_context(*unstacked(kind), prompts, seed=seeds, max_new_tokens=limits)
    for b, row in enumerate(zip(prompts, seeds, limits, strict=True)):
        prompt, seed, limit = row
        assert together[b] == generate(*unstacked(kind), prompt, seed=seed, max_new_tokens=limit)
        alone = read(*unstacked(kind), prompt + together[b])
        assert error_ratio(context.logits_BV[b : b + 1], alone.logits_BV) < 1e-5
    assert together[0] == together[2]
    first, second = generate(*unstacked(kind), [ids(5), ids(5)], seed=7, max_new_tokens=50)
    assert first == together[0] and first != second


@KINDS
def test_stop_tokens_end_a_row_and_are_not_read(kind):
    prompts = [ids(5), ids(9, seed=3), ids(2, seed=4)]
    whole = generate(*unstacked(kind), prompts, max_new_tokens=60)
    stops = {whole[0][37], whole[1][0]}
    expected = [next((row[:i] for i, t in enumerate(row) if t in stops), row) for row in whole]
    assert len({len(row) for row in expected}) > 1 and expected[1] == []
    tokens, context = generate_with_context(*unstacked(kind), prompts, max_new_tokens=60, stop_tokens=stops)
    assert tokens == expected
    for b, prompt in enumerate(prompts):
        alone = read(*unstacked(kind), prompt + tokens[b])
        assert error_ratio(context.logits_BV[b : b + 1], alone.logits_BV) < 1e-5


@KINDS
def test_what_has_ended_does_not_change(kind):
    """Bit for bit: the row that stopped at once has the context from before."""
    before = read(*unstacked(kind), [ids(5), ids(5, seed=3)])
    stop = int(before.logits_BV[0].argmax())
    tokens, after = generate_with_context(
        *unstacked(kind), [[], []], context=before, max_new_tokens=9, stop_tokens=[stop], **GREEDY
    )
    assert tokens[0] == [] and len(tokens[1]) == 9
    assert_equal(rows(before, 0), rows(after, 0))


@KINDS
def test_going_on_from_a_context_is_one_longer_run(kind):
    whole = generate(*unstacked(kind), ids(5), max_new_tokens=50, seed=7)
    first, context = generate_with_context(*unstacked(kind), ids(5), max_new_tokens=10, seed=7)
    second = generate(*unstacked(kind), [], context=context, max_new_tokens=40, seed=7, start=10)
    assert first + second == whole
    assert first + generate(*unstacked(kind), [], context=context, max_new_tokens=40, seed=7) != whole


def test_caches_grow_while_decoding(monkeypatch):
    monkeypatch.setattr("rwkv_jax.generate.decode.LIKELY", 1)
    tokens, context = generate_with_context(*unstacked("transformer"), ids(250), max_new_tokens=300, **GREEDY)
    slots = context.state[0].cache.k_BHSK.shape[2]
    assert (
        slots == 768
        and error_ratio(context.logits_BV, read(*unstacked("transformer"), ids(250) + tokens).logits_BV) < 1e-5
    )


def test_a_seed_is_a_text():
    draw = functools.partial(generate, *unstacked("rwkv4"), ids(5))
    tokens = draw(max_new_tokens=DISPATCH + 8, seed=7)
    assert tokens == draw(max_new_tokens=DISPATCH + 8, seed=7)
    assert tokens[:10] == draw(max_new_tokens=10, seed=7)
    assert tokens != draw(max_new_tokens=DISPATCH + 8, seed=8)
    assert all(isinstance(token, int) for token in tokens)


def test_an_empty_prompt_is_the_separator():
    assert generate(*unstacked("rwkv4"), [], seed=7) == generate(*unstacked("rwkv4"), [0], seed=7)
    first, second = generate(*unstacked("rwkv4"), np.zeros((2, 0), int), max_new_tokens=9, **GREEDY)
    assert first == second == generate(*unstacked("rwkv4"), [0], max_new_tokens=9, **GREEDY)


def test_penalties_know_prompt_and_continuation():
    draw = functools.partial(generate, *unstacked("rwkv4"), ids(5), max_new_tokens=40, **GREEDY)
    assert len(set(draw(presence_penalty=1000.0))) == 40
    assert len(set(draw(repetition_penalty=1000.0)) - set(ids(5))) == 40
    assert len(set(draw())) < 40


def test_a_sampler_of_ones_own():
    tokens = generate(*unstacked("rwkv4"), ids(5), max_new_tokens=3, sampler=lambda x, key, history: x.argmin(-1))
    logits = forward(*case("rwkv4"), np.array([ids(5) + tokens[:-1]]))[0][0, 4:]
    assert tokens == logits.argmin(-1).tolist()


@pytest.mark.parametrize("kind", ["rwkv4", "transformer"])
def test_nothing_is_compiled_twice(kind, caplog):
    model = rwkv_jax.build(kind, vocab_size=256, num_layers=1, dim=8, scan=False)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        generate(model, params, ids(5), max_new_tokens=3, temperature=0.7, top_p=0.9)
        generate(model.clone(), params, ids(8), max_new_tokens=100, temperature=0.5, top_p=0.8, seed=3)
        list(stream(model, params, "abcdef", ByteTokenizer(), max_new_tokens=5, top_p=0.7, stop_tokens=[1, 2]))
    messages = [record.message for record in caplog.records if "XLA compilation of" in record.message]
    assert [sum(f"jit({name})" in message for message in messages) for name in ("_read", "_decode")] == [1, 1]


def test_mistakes_are_named_when_asked_not_when_read():
    model, params = unstacked("rwkv4")
    two = read(model, params, [[1], [2]])
    for change, message in (
        ({"prompt_ids": [1, 256]}, "holds token 256, expected ids from 0 to 255"),
        ({"prompt_ids": [-1]}, "holds token -1"),
        ({"prompt_ids": [[1], [2, 300]]}, "holds token 300"),
        ({"prompt_ids": "abc"}, "expected ids"),
        ({"prompt_ids": [0.5]}, "expected ids"),
        ({"prompt_ids": np.zeros((0, 3), int)}, "expected ids"),
        ({"prompt_ids": np.zeros((1, 3, 3), int)}, "expected ids"),
        ({"temperature": -1}, "temperature is -1, expected 0"),
        ({"top_p": 0}, "top_p is 0, expected"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": [1, 2]}, "one for each of 1 prompts"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -1}, "start is -1"),
        ({"stop_tokens": [256]}, "stop_tokens holds 256"),
        ({"penalty_decay": 2, "presence_penalty": 1.0}, "decay of penalties is 2"),
        ({"logit_bias": {256: 1.0}}, "logit_bias names token 256"),
        ({"sampler": sampler(), "top_p": 0.5}, "both a sampler and top_p"),
        ({"context": two}, "the context holds 2 texts, expected one for each of the 1 prompts"),
        ({"context": read(*unstacked("hybrid"), [1])}, "not one of this model"),
        ({"logit_bias": dict.fromkeys(range(256), -np.inf)}, "row 0 has no token to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, params, **{"prompt_ids": [1]} | change)
    with pytest.raises(ValueError, match="top_p is 0"):
        stream(model, params, "a", ByteTokenizer(), top_p=0)
    for size in (100, 300):
        with pytest.raises(ValueError, match=f"tokenizer bytes has 256 tokens, the model {size}"):
            stream(model.clone(vocab_size=size), params, "a", ByteTokenizer())
