"""Decoding with a draft: its text, its distribution, and the contexts it leaves."""

import functools

import jax
import numpy as np
import pytest
from generating import NEARLY_GREEDY, B, assert_near, ids, random_context, unstacked, whole
from scipy import stats
from small import drawn

import rwkv_jax
from rwkv_jax import generate
from rwkv_jax.generate import sampling, speculative
from rwkv_jax.models import rewind

SLOW = pytest.mark.slow
PROMPTS = [ids(5), ids(2, seed=3), [6]]

# The fast tests share one compiled function: a hybrid, a draft of RWKV-4, two guesses, and a sampler with a penalty,
# which in most of them is too small to change anything.
NUM_DRAFT = 2
PENALTY = {"frequency_penalty": 1e-9}


def drafted(**settings):
    return {"draft": unstacked("rwkv4"), "num_draft": NUM_DRAFT} | PENALTY | settings


def target(share):
    """A hybrid whose first layers are the draft's, and what attention adds is scaled by `share`: of 0 it is the same
    function as the draft, of 1 another one."""
    model, params = unstacked("hybrid")
    block = params["blocks_1"]
    scaled = {
        "att": block["att"] | {"output": jax.tree.map(lambda x: share * x, block["att"]["output"])},
        "ffn": block["ffn"] | {"value": jax.tree.map(lambda x: share * x, block["ffn"]["value"])},
    }
    return model, unstacked("rwkv4")[1] | {"blocks_1": block | scaled}


def assert_likeliest(model, params, prompts, tokens, near_tie=1e-3):
    """Each token is the likeliest after the prompt and those before it, from one pass over all of them."""
    found, _ = whole(model, params, [[*a, *b] for a, b in zip(prompts, tokens, strict=True)])
    for prompt, new, logits_TV in zip(prompts, tokens, found, strict=True):
        for token, logits_V in zip(new, logits_TV[len(prompt) - 1 : -1], strict=True):
            assert logits_V[token] > logits_V.max() - near_tie


# Others, with token shift in attention and of a vocabulary in which all continuations can be counted.
V = 12
SMALL = {"num_layers": 2, "token_shift": True, "matmul_precision": "highest", "scan": False, "vocab_size": V}
LAYERS = {"rwkv4": ("rwkv4",), "hybrid": ("rwkv4", "attention")}


@functools.cache
def case(kind, seed, dim=16, scale=0.7):
    return drawn(rwkv_jax.build("rwkv4", layers=LAYERS[kind], dim=dim, **SMALL), seed, scale)


def near(kind, noise=0.05, **fields):
    """A draft that agrees often, and not always."""
    model, params = case(kind, seed=1, **fields)
    rng = np.random.default_rng(5)
    return model, jax.tree.map(lambda x: x + noise * rng.standard_normal(x.shape, np.float32), params)


# --------------------------------------------------------------------------------------------------- going back


@pytest.mark.parametrize("kind", ["hybrid", pytest.param("rwkv4", marks=SLOW)])
def test_rewind_returns_the_state_after_some_tokens_of_a_pass(kind):
    model, params = case(kind, seed=1)
    tokens_BT, count_B = np.random.default_rng(0).integers(0, V, (6, 5)), np.arange(6)
    before = random_context(model, 6).state
    if kind == "hybrid":
        cache = before[1].cache._replace(length_B=np.full(6, 3, np.int32))
        before = (before[0], before[1]._replace(cache=cache))
    found, expected = _rewound(model, params, tokens_BT, count_B, before)
    assert_near(generate.Context(found, count_B), generate.Context(expected, count_B))


@functools.partial(jax.jit, static_argnums=0)
def _rewound(model, params, tokens_BT, count_B, before):
    _, after, made = rewind.read(model, params, tokens_BT, before)
    valid_BT = np.arange(5)[None] < count_B[:, None]
    _, expected = model.apply({"params": params}, tokens_BT, before, valid_BT=valid_BT)
    return rewind.state_after(model, params, before, after, made, count_B), expected


# --------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["the same", "near", "another"])
def test_speculative_greedy_text_is_independent_of_the_draft(share, monkeypatch):
    """One that is always right, whose guesses all stay, one that is so at times, and one that hardly ever is."""
    calls, rounds = [], speculative._rounds
    monkeypatch.setattr(speculative, "_rounds", lambda *args: calls.append(1) or rounds(*args))
    model, params = target(share)
    settings = drafted(max_new_tokens=[70, 1, 45], **NEARLY_GREEDY)
    tokens, context = speculative.generate_with_context(model, params, PROMPTS, **settings)
    assert [len(new) for new in tokens] == [70, 1, 45]
    fewest = -(-70 // (speculative.ROUNDS * (NUM_DRAFT + 1)))
    assert len(calls) == fewest if share == 0 else len(calls) > fewest
    assert_likeliest(model, params, PROMPTS, tokens)
    texts = [[*a, *b] for a, b in zip(PROMPTS, tokens, strict=True)]
    assert_near(context, whole(model, params, texts)[1])


def sure_of(token, params, logit):
    """The parameters of a model whose logit for a token is always the same; without a model's own, of its head."""
    changed = jax.tree.map(np.array, {"ln_out": params["ln_out"], "head": params["head"]})
    changed["ln_out"]["scale"][0], changed["ln_out"]["bias"][0] = 0, 1
    changed["head"]["kernel"][:, token] = 0
    changed["head"]["kernel"][0, token] = logit
    return params | changed


def test_speculative_draws_after_a_useless_draft_equal_plain_decoding():
    """The draft is sure of a token that the model never draws: what stays of the model's distribution is all of it.
    Penalties count the tokens that were drawn, and none that were only guessed."""
    (model, params), (small, small_params) = target(1), unstacked("rwkv4")
    params, draft = sure_of(255, params, -100), (small, sure_of(255, small_params, 100))
    settings = {"max_new_tokens": 60, "seed": [1, 2, 3], "frequency_penalty": 2.0, "penalty_decay": 0.9}
    tokens = speculative.generate(model, params, PROMPTS, draft=draft, num_draft=NUM_DRAFT, **settings)
    assert tokens == generate.generate(model, params, PROMPTS, **settings)


def test_speculative_never_draws_a_refused_token_instead_of_itself():
    """The draft is sure of a token that the model draws every other time, so what stays of it when refused is none:
    without taking q away it would be three times of four."""
    (model, params), (small, small_params) = target(1), unstacked("rwkv4")
    params, draft = sure_of(255, params, 6.7), (small, sure_of(255, small_params, 100))
    tokens = speculative.generate(model, params, PROMPTS, **drafted(draft=draft, max_new_tokens=60, seed=[1, 2, 3]))
    share = np.mean(np.concatenate(tokens) == 255)
    assert 0.4 < share < 0.6


@SLOW
@pytest.mark.parametrize(
    ("kind", "draft", "num_draft"), [("hybrid", "near", 1), ("rwkv4", "other", 1), ("hybrid", "other", 4)]
)
def test_speculative_greedy_text_equals_plain_decoding(kind, draft, num_draft):
    """Of other sizes, with token shift in attention and the sampler of temperature 0."""
    model = case(kind, seed=1)
    helper = near(kind) if draft == "near" else case(kind, seed=2, dim=8)
    settings = {"max_new_tokens": [70, 1, 45], "temperature": 0}
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    tokens, context = speculative.generate_with_context(*model, prompts, draft=helper, num_draft=num_draft, **settings)
    assert_likeliest(*model, prompts, tokens)
    plain = generate.generate(*model, prompts, **settings)
    logits, expected = whole(*model, [[*a, *b] for a, b in zip(prompts, plain, strict=True)])
    for prompt, row, wanted, logits_TV in zip(prompts, tokens, plain, logits, strict=True):
        best = np.sort(logits_TV[len(prompt) - 1 : -1])
        ties = np.flatnonzero(best[:, -1] - best[:, -2] <= 1e-3)
        clear = ties[0] if len(ties) else len(wanted)
        assert clear > 0 and row[:clear] == wanted[:clear] and len(row) == len(wanted)
    if tokens == plain:
        assert_near(context, expected)


# --------------------------------------------------------------------------------------------------- distribution


@SLOW
@pytest.mark.parametrize(
    ("draft_is", "num_draft", "settings"),
    [
        ("near", 1, {}),
        ("other", 2, {"temperature": 0.7, "top_p": 0.8}),
        ("other", 1, {"frequency_penalty": 1.5, "repetition_penalty": 1.3}),
    ],
)
def test_speculative_draws_follow_the_probabilities_of_the_model(draft_is, num_draft, settings):
    model, params = case("rwkv4", seed=1, scale=0.3)
    draft = near("rwkv4", 0.1, scale=0.3) if draft_is == "near" else case("rwkv4", seed=2, dim=8, scale=0.8)
    prompt, num_rows = [3, 1, 4, 1, 5], 4000
    drafted = {"draft": draft, "num_draft": num_draft, "max_new_tokens": 3, "seed": list(range(num_rows))}
    tokens = speculative.generate(model, params, [prompt] * num_rows, **drafted, **settings)
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
    logits_BTV = jax.jit(model.apply)({"params": params}, line_BT)[0][:, len(prompt) - 1 :]
    history = sampling.history(len(pairs), V, [prompt] * len(pairs), sampler=sampler)
    softmax = jax.jit(lambda logits_BV, history: jax.nn.softmax(sampling.distribution(sampler, logits_BV, history)))
    p = []
    for t in range(3):
        p.append(np.asarray(softmax(logits_BTV[:, t], history), np.float64))
        if t < 2:
            history = history.add(pairs[:, t])
    a, b = pairs.T
    rows = np.arange(len(pairs))
    return ((p[0][rows, a] * p[1][rows, b])[:, None] * p[2]).reshape(V, V, V)


# --------------------------------------------------------------------------------------------------- ends


def test_speculative_stop_tokens_end_rows_and_are_not_read():
    model, params = target(0.2)
    settings = drafted(max_new_tokens=80, seed=[1, 2, 3])
    free = speculative.generate(model, params, PROMPTS, **settings)
    assert [len(new) for new in free] == [80] * B
    for stop in {free[0][0], free[0][1], *free[0][20:24], free[1][79], *free[2][40:43]}:
        tokens, context = speculative.generate_with_context(model, params, PROMPTS, stop_tokens=[stop], **settings)
        assert tokens == [new[: new.index(stop)] if stop in new else new for new in free]
        texts = [[*a, *b] for a, b in zip(PROMPTS, tokens, strict=True)]
        assert_near(context, whole(model, params, texts)[1])


@pytest.mark.parametrize("share", [0.2, pytest.param(1, marks=SLOW)])
def test_speculative_rows_depend_on_their_own_seed_and_continue_a_context(share):
    model, params = target(share)
    settings = drafted(max_new_tokens=40)
    rows = speculative.generate(model, params, PROMPTS, seed=[4, 5, 6], **settings)
    others = [ids(9, seed=7), PROMPTS[1], ids(1, seed=8)]
    assert rows[1] == speculative.generate(model, params, others, seed=[6, 5, 4], **settings)[1]
    context = generate.read(model, params, PROMPTS)
    before = jax.tree.map(np.array, context)
    first, after = speculative.generate_with_context(model, params, [[]] * B, context=context, seed=3, **settings)
    plain = generate.generate(model, params, PROMPTS, max_new_tokens=1, seed=3, **PENALTY)
    assert [new[:1] for new in first] == plain  # the first draw is the plain one
    assert_near(after, whole(model, params, [[*a, *b] for a, b in zip(PROMPTS, first, strict=True)])[1])
    jax.tree.map(np.testing.assert_array_equal, context, before)


def test_speculative_names_mistakes():
    model, params = unstacked("rwkv4")
    wide = model.clone(vocab_size=257)
    with pytest.raises(ValueError, match="vocabulary of 257, expected the model's 256"):
        speculative.generate(model, params, [1], draft=(wide, params))
    with pytest.raises(ValueError, match="num_draft is 0"):
        speculative.generate(model, params, [1], draft=(model, params), num_draft=0)


def test_speculative_names_a_row_with_no_token_to_draw():
    model, params = target(0)
    context = generate.read(model, params, PROMPTS)
    logits_BV = np.array(context.logits_BV)
    logits_BV[1] = np.nan
    with pytest.raises(ValueError, match="row 1 has no token to draw"):
        speculative.generate(model, params, [[]] * B, **drafted(context=generate.Context(context.state, logits_BV)))
