import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from scipy import stats
from small import drawn

import rwkv_jax
from rwkv_jax import generate
from rwkv_jax.generate import sampling, speculative
from rwkv_jax.models import rewind

V = 12
LAYERS = {"rwkv4": ("rwkv4",), "hybrid": ("rwkv4", "attention")}
KINDS = pytest.mark.parametrize("kind", LAYERS)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6]]


@functools.cache
def case(kind, seed, dim=16, scale=0.7):
    fields = {"num_layers": 2, "token_shift": True, "matmul_precision": "highest", "scan": False}
    return drawn(rwkv_jax.build("rwkv4", layers=LAYERS[kind], vocab_size=V, dim=dim, **fields), seed, scale)


def near(kind):
    """A draft that agrees often, and not always."""
    model, params = case(kind, seed=1)
    rng = np.random.default_rng(5)
    return model, jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), params)


def other(kind):
    return case(kind, seed=2, dim=8)


def same(kind):
    return case(kind, seed=1)


def logits_after(kind, prompt, tokens):
    """Float32 logits [n, V] from which a plain reading draws each of the tokens."""
    model, params = case(kind, seed=1)
    line = np.array([[*prompt, *tokens]])
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, line, model.init_state(1, max_length=256))
    return np.asarray(logits_BTV[0, len(prompt) - 1 : -1])


def assert_greedy(kind, prompt, tokens, near_tie=1e-3):
    for token, logits in zip(tokens, logits_after(kind, prompt, tokens), strict=True):
        assert logits[token] > logits.max() - near_tie


# --------------------------------------------------------------------------------------------------- going back


@KINDS
def test_the_state_after_some_tokens_of_a_pass(kind):
    model, params = case(kind, seed=1)
    tokens_BT = np.random.default_rng(0).integers(0, V, (6, 5))
    count_B = np.arange(6)
    _, before = model.apply({"params": params}, tokens_BT[:, :3], model.init_state(6, max_length=32))
    _, after, made = rewind.read(model, params, tokens_BT, before)
    state = rewind.state_after(model, params, before, after, made, jnp.asarray(count_B))
    valid_BT = np.arange(5)[None] < count_B[:, None]
    _, expected = model.apply({"params": params}, tokens_BT, before, valid_BT=valid_BT)
    follow = lambda state: model.apply({"params": params}, tokens_BT[:, ::-1], state)[0]
    assert_same(generate.Context(state, follow(state)), generate.Context(expected, follow(expected)))


# --------------------------------------------------------------------------------------------------- greedy


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "draft", "num_draft"),
    [
        pytest.param("rwkv4", near, 4, marks=SLOW),
        pytest.param("hybrid", near, 1, marks=SLOW),
        pytest.param("rwkv4", other, 1, marks=SLOW),
        pytest.param("hybrid", other, 4, marks=SLOW),
        ("rwkv4", same, 3),
    ],
)
def test_greedy_text_is_that_of_plain_decoding(kind, draft, num_draft):
    draft = draft(kind)
    settings = {"max_new_tokens": [70, 1, 45], "temperature": 0}
    tokens, context = speculative.generate_with_context(
        *case(kind, seed=1), PROMPTS, draft=draft, num_draft=num_draft, **settings
    )
    plain = generate.generate(*case(kind, seed=1), PROMPTS, **settings)
    assert [len(row) for row in tokens] == [70, 1, 45]
    for prompt, row, expected in zip(PROMPTS, tokens, plain, strict=True):
        logits = np.sort(logits_after(kind, prompt, expected))
        ties = np.flatnonzero(logits[:, -1] - logits[:, -2] <= 1e-3)
        clear = ties[0] if len(ties) else len(expected)
        assert clear > 0 and row[:clear] == expected[:clear]
        assert_greedy(kind, prompt, row)
    whole = generate.read(*case(kind, seed=1), [[*a, *b] for a, b in zip(PROMPTS, tokens, strict=True)])
    assert_same(context, whole)


def assert_same(context, expected):
    assert error_ratio(context.logits_BV, expected.logits_BV) < 1e-5
    for entry, wanted in zip(context.state, expected.state, strict=True):
        for name in set(entry._fields) - {"cache"}:
            for x, y in zip(
                jax.tree.leaves(getattr(entry, name)), jax.tree.leaves(getattr(wanted, name)), strict=True
            ):
                assert error_ratio(x, y) < 1e-5
        if "cache" in entry._fields:
            np.testing.assert_array_equal(entry.cache.length_B, wanted.cache.length_B)


# --------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize(
    ("draft_is", "num_draft", "settings"),
    [
        pytest.param("near", 1, {}, marks=SLOW),
        pytest.param("other", 2, {"temperature": 0.7, "top_p": 0.8}, marks=SLOW),
        pytest.param("other", 1, {"frequency_penalty": 1.5, "repetition_penalty": 1.3}, marks=SLOW),
    ],
)
def test_three_tokens_are_drawn_with_the_probabilities_of_the_model(draft_is, num_draft, settings):
    model, params = case("rwkv4", seed=1, scale=0.3)
    draft = case("rwkv4", seed=2, dim=8, scale=0.8)
    if draft_is == "near":
        rng = np.random.default_rng(5)
        draft = model, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    prompt, B = PROMPTS[0], 6000
    settings = {"draft": draft, "num_draft": num_draft, "max_new_tokens": 3, "seed": list(range(B))} | settings
    tokens = speculative.generate(model, params, [prompt] * B, **settings)
    settings = {name: x for name, x in settings.items() if name in ("temperature", "top_p") or "penalty" in name}
    expected = exact(model, params, prompt, settings)
    assert abs(expected.sum() - 1) < 1e-4
    counts = np.zeros((V,) * 3)
    np.add.at(counts, tuple(np.array(tokens).T), 1)
    for axes in ((1, 2), 2, 0):
        assert_drawn_from(expected.sum(axes).ravel(), counts.sum(axes).ravel())


def assert_drawn_from(p, counts):
    """Chi-square; what is expected less than five times counts together."""
    assert counts[p == 0].sum() == 0
    wanted = p / p.sum() * counts.sum()
    many, few = wanted >= 5, (wanted < 5) & (p > 0)
    fold = lambda x: np.append(x[many], [x[few].sum()] if few.any() else [])
    assert stats.chisquare(fold(counts), fold(wanted)).pvalue > 1e-3


def exact(model, params, prompt, settings):
    """Probabilities [V, V, V] of the three tokens after a prompt."""
    sampler = sampling.sampler(**settings)
    pairs = np.stack(np.meshgrid(np.arange(V), np.arange(V), indexing="ij"), -1).reshape(-1, 2)
    line_BT = np.concatenate([np.tile(prompt, (len(pairs), 1)), pairs], axis=1)
    logits_BTV = model.apply({"params": params}, line_BT)[0][:, len(prompt) - 1 :]
    history = sampling.history(len(pairs), V, [prompt] * len(pairs), sampler=sampler)
    p = []
    for t in range(3):
        p.append(np.asarray(jax.nn.softmax(sampling.distribution(sampler, logits_BTV[:, t], history)), np.float64))
        if t < 2:
            history = history.add(jnp.asarray(pairs[:, t]))
    a, b = pairs.T
    rows = np.arange(len(pairs))
    return ((p[0][rows, a] * p[1][rows, b])[:, None] * p[2]).reshape(V, V, V)


# --------------------------------------------------------------------------------------------------- ends


@KINDS
def test_a_stop_token_ends_a_row_and_is_not_read(kind):
    settings = {"draft": near(kind), "num_draft": 4, "max_new_tokens": 80, "seed": [1, 2, 3]}
    free = speculative.generate(*case(kind, seed=1), PROMPTS, **settings)
    for stop in range(V):
        tokens, context = speculative.generate_with_context(
            *case(kind, seed=1), PROMPTS, stop_tokens=[stop], **settings
        )
        assert tokens == [row[: row.index(stop)] if stop in row else row for row in free]
    assert_same(context, generate.read(*case(kind, seed=1), [[*a, *b] for a, b in zip(PROMPTS, tokens, strict=True)]))


def test_a_row_depends_on_its_own_seed_and_continues_a_context():
    model, params = case("rwkv4", seed=1)
    settings = {"draft": near("rwkv4"), "max_new_tokens": 40}
    rows = speculative.generate(model, params, PROMPTS, seed=[4, 5, 6], **settings)
    assert rows[1] == speculative.generate(model, params, PROMPTS[1], seed=5, **settings)
    context = generate.read(model, params, PROMPTS[0])
    settings["draft"] = case("rwkv4", seed=2, dim=8)
    first, after = speculative.generate_with_context(model, params, [], context=context, **settings)
    assert first[:1] == generate.generate(model, params, PROMPTS[0], max_new_tokens=1)  # its draw is the plain one
    assert_same(after, generate.read(model, params, [*PROMPTS[0], *first]))
    assert_same(context, generate.read(model, params, PROMPTS[0]))


def test_bad_arguments():
    model, params = case("rwkv4", seed=1)
    wide = rwkv_jax.build("rwkv4", vocab_size=V + 1, num_layers=1, dim=8)
    with pytest.raises(ValueError, match="vocabulary of 13, expected the model's 12"):
        speculative.generate(
            model, params, [1], draft=(wide, wide.init(jax.random.key(0), np.zeros((1, 1), int))["params"])
        )
    with pytest.raises(ValueError, match="num_draft is 0"):
        speculative.generate(model, params, [1], draft=(model, params), num_draft=0)
    banned = {"logit_bias": {i: -np.inf for i in range(V)}}
    with pytest.raises(ValueError, match="row 0 has no token to draw"):
        speculative.generate(model, params, [1], draft=(model, params), **banned)
