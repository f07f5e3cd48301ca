"""The filters of samplers against their definitions in NumPy; live against transformers and the rwkv package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from logits import ALL, CASES, INF, LOGITS, V, filtered, kept, probabilities
from scipy import special

from rwkv_jax.generate import filters
from rwkv_jax.generate.sampling import history, sampler

ROUNDING = 1e-5  # of sums of float32 probabilities: which token crosses a limit is open where it is this near
SHARE = st.floats(0.01, 0.99)
PENALTIES = ("presence_penalty", "frequency_penalty")


def assert_smallest(kept_V, order, p_V, share):
    """The first tokens of an order, as few as reach a share of the probability."""
    size = kept_V.sum()
    assert size and kept_V[order[:size]].all()
    sum_V = np.cumsum(p_V[order])
    assert sum_V[size - 1] >= share - ROUNDING
    assert size == 1 or sum_V[size - 2] < share + ROUNDING


@CASES
@given(LOGITS, st.integers(1, V + 3))
def test_top_k(logits_V, k):
    expected = np.zeros(V, bool)
    expected[np.argsort(-logits_V, kind="stable")[:k]] = True
    np.testing.assert_array_equal(kept(logits_V, top_k=k), expected & (logits_V > -INF))


@CASES
@given(LOGITS, SHARE, st.sampled_from([0.5, 1.0, 2.0]))
@example(np.zeros(V, np.float32), 0.5, 1.0)
def test_top_p(logits_V, top_p, temperature):
    kept_V = kept(logits_V, top_p=top_p, temperature=temperature)
    assert_smallest(kept_V, np.argsort(-logits_V, kind="stable"), probabilities(logits_V / temperature), top_p)


def test_top_p_keeps_the_token_that_crosses_it():
    logits_V = np.log(np.float32([0.125, 0.5, 0.125, 0.25]))
    for top_p, expected in ((0.4, [1]), (0.6, [1, 3]), (0.8, [0, 1, 3]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert np.flatnonzero(kept(logits_V, top_p=top_p)).tolist() == expected


@CASES
@given(LOGITS, SHARE)
def test_min_p(logits_V, min_p):
    p_V = probabilities(logits_V)
    ratio_V, kept_V = p_V / p_V.max(), kept(logits_V, min_p=min_p)
    assert kept_V[ratio_V >= min_p * (1 + ROUNDING)].all() and not kept_V[ratio_V < min_p * (1 - ROUNDING)].any()


@CASES
@given(LOGITS, SHARE)
def test_typical(logits_V, typical_p):
    p_V = probabilities(logits_V)
    surprise_V = -special.log_softmax(np.float64(logits_V))
    distance_V = np.abs(surprise_V - special.entr(p_V).sum())
    left_V = filtered(logits_V, typical_p=typical_p)
    assert left_V.max() == 0  # or a small temperature that comes last overflows
    kept_V = np.isfinite(left_V)
    near = 20 * ROUNDING  # distances that float32 cannot tell apart come in either order
    assert not kept_V[p_V == 0].any()
    assert kept_V.all() or distance_V[kept_V].max() <= distance_V[~kept_V].min() + near
    mass = p_V[kept_V].sum()
    removable = p_V[kept_V & (distance_V >= distance_V[kept_V].max() - near)].max()
    assert mass >= typical_p - ROUNDING and mass - removable < typical_p + ROUNDING
    for value in np.unique(logits_V[kept_V]):
        of_equal = kept_V[logits_V == value]
        assert of_equal[: of_equal.sum()].all()


def test_typical_prefers_surprise_like_the_entropy():
    logits_V = np.log(np.float32([0.6, 0.2, 0.1, 0.1]))
    # entropy 1.089; surprises 0.511, 1.609, 2.303: distances 0.578, 0.521, 1.214
    assert np.flatnonzero(kept(logits_V, typical_p=0.1)).tolist() == [1]
    assert np.flatnonzero(kept(logits_V, typical_p=0.3)).tolist() == [0, 1]
    assert np.flatnonzero(kept(logits_V, typical_p=0.85)).tolist() == [0, 1, 2]


@settings(CASES, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2.0**-3, 2.0**-18]))
def test_vocabularies_of_many_blocks(seed, grain):
    """With ties and without."""
    size = 3 * filters.LANES + 7
    logits_V = np.random.default_rng(seed).normal(scale=2, size=size).astype(np.float32)
    logits_V = np.round(logits_V / grain).astype(np.float32) * np.float32(grain)
    order = np.argsort(-logits_V, kind="stable")
    for k in (1, 40, 700):
        assert set(np.flatnonzero(kept(logits_V, top_k=k))) == set(order[:k])
    for top_p in (0.1, 0.9, 0.999):
        assert_smallest(kept(logits_V, top_p=top_p), order, probabilities(logits_V), top_p)


@CASES
@given(LOGITS, st.sampled_from([0.25, 1.0, 3.0]), st.booleans())
def test_temperature(logits_V, temperature, last):
    actual_V = filtered(logits_V, temperature=temperature, temperature_last=last)
    assert actual_V.max() == 0
    np.testing.assert_allclose(probabilities(actual_V), probabilities(logits_V / np.float64(temperature)), atol=1e-6)


def test_order_of_the_filters():
    logits_V = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
    # of two tokens 0.4 is a share of 0.57; of all it is not
    assert kept(logits_V, top_k=2, top_p=0.5).tolist() == [True, False, False, False]
    assert kept(logits_V, top_k=2, top_p=0.5, temperature_last=True).tolist() == [True, True, False, False]
    # of temperature 2 the shares are 0.31 0.27 0.22 0.16
    assert kept(logits_V, top_p=0.65, temperature=2).sum() == 3
    assert kept(logits_V, top_p=0.65, temperature=2, temperature_last=True).sum() == 2
    assert kept(logits_V, min_p=0.4, temperature=2).sum() == 4
    assert kept(logits_V, min_p=0.4, temperature=2, temperature_last=True).sum() == 3
    # nearest to the entropy of all four, 1.28, is token 1; of the first two, it is token 1 as well; of one, that one
    assert kept(logits_V, typical_p=0.1).tolist() == [False, True, False, False]
    assert kept(logits_V, typical_p=0.1, min_p=0.9).tolist() == [True, False, False, False]
    # the first token falls behind the second before top-k
    seen = history(1, 4, [[0]])
    assert np.isfinite(filtered(np.float32([1, 0.8, 0, 0]), seen, repetition_penalty=2.0, top_k=1)).tolist() == [
        *(False, True, False, False)
    ]


# -------------------------------------------------------------------------------------------------- scores


def scores(logits_V, history_=None, **settings):
    """Before the offset that makes the largest 0."""
    return np.asarray(filters.scores(np.float32(logits_V)[None], history_, sampler(**settings).keywords)[0])


def test_penalties():
    before = history(1, 5, [[0, 1]], decay=0.5)
    after = before.add(jnp.array([2])).add(jnp.array([3])).add(jnp.array([3]))  # counts: 0, 0, 1/4, 3/2, 0
    logits = [2.0, -2.0, 2.0, -2.0, 1.0]
    np.testing.assert_array_equal(scores(logits, after, repetition_penalty=4.0), [0.5, -8, 0.5, -8, 1])
    np.testing.assert_array_equal(scores(logits, after, presence_penalty=0.5), [2, -2, 1.5, -2.5, 1])
    np.testing.assert_array_equal(scores(logits, after, frequency_penalty=2.0), [2, -2, 1.5, -5, 1])
    together = scores(logits, after, repetition_penalty=4.0, presence_penalty=0.5, frequency_penalty=-2.0)
    np.testing.assert_array_equal(together, [0.5, -8, 0.5, -5.5, 1])
    # a bias comes before the penalty that asks for the sign
    np.testing.assert_array_equal(scores(logits, after, logit_bias={1: 6}, repetition_penalty=4.0)[1], 1)


def test_logit_bias():
    logits = [1.0, 2.0, 3.0, 4.0]
    actual = scores(logits, logit_bias={3: -INF, 0: 1.5, 1: -1})
    np.testing.assert_array_equal(actual, [2.5, 1, 3, -INF])


def naive_ban(text, words, size):
    return {word[-1] for word in words if len(word) == 1 or text[-len(word) + 1 :] == word[:-1]} & set(range(size))


@CASES
@given(
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.integers(0, 2), max_size=20),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=5, max_size=8),
    st.integers(1, 16),
)
def test_bad_words(prompt, continuation, words, length):
    """Three tokens only, and one of the words is where the text is."""
    text = prompt + continuation
    words = [*words[:-1], [*text[-length:], 1][-16:]]
    at = history(1, 3, [prompt])
    for token in continuation:
        at = _add(at, np.array([token], np.int32))
    banned = set(np.flatnonzero(scores([0.0] * 3, at, bad_words_ids=words) == -INF))
    assert banned == naive_ban(text, words, 3)


_add = jax.jit(lambda history, tokens_B: history.add(tokens_B))


@CASES
@given(st.data())
def test_history(data):
    tokens = st.integers(0, V - 1)
    prompts = [data.draw(st.lists(tokens, max_size=20)) for _ in range(2)]
    continuation = data.draw(st.lists(st.tuples(tokens, tokens), max_size=6))
    decay_B = np.float32([0.5, 1.0])
    at = history(2, V, prompts, decay_B)
    for token_B in continuation:
        at = _add(at, np.array(token_B, np.int32))
    for b in range(2):
        new = [token_B[b] for token_B in continuation]
        text = prompts[b] + new
        assert set(np.flatnonzero(at.seen_BV[b])) == set(text)
        counts = [
            sum(float(decay_B[b]) ** (len(new) - 1 - i) for i in range(len(new)) if new[i] == v) for v in range(V)
        ]
        np.testing.assert_allclose(at.counts_BV[b], counts, rtol=1e-6)
        assert at.recent_BR[b].tolist() == ([-1] * 16 + text)[-16:]


def test_a_presence_lasts_however_long_ago():
    at = history(1, 3, decay=0.01).add(jnp.array([1]))
    for _ in range(60):
        at = _add(at, np.array([2], np.int32))
    assert (at.counts_BV > 0).tolist() == [[False, True, True]]


def test_a_history_holds_what_its_sampler_reads():
    def leaves(**settings):
        at = history(2, V, [[1], [2]], sampler=sampler(**settings)).add(jnp.array([3, 4]))
        return {name for name, leaf in at._asdict().items() if leaf is not None}

    assert leaves(top_p=0.5, logit_bias={1: 1.0}) == set()
    assert leaves(repetition_penalty=1.5) == {"seen_BV"}
    assert leaves(presence_penalty=1.5) == leaves(frequency_penalty=1) == {"counts_BV", "decay_B"}
    assert leaves(temperature=0, bad_words_ids=[[1]]) == {"recent_BR"}
    assert all(leaf is not None for leaf in history(1, V, sampler=lambda *_: None))
    with pytest.raises(ValueError, match="presence_penalty needs the history's counts_BV, which is None"):
        sampler(presence_penalty=1)(jnp.zeros((1, V)), None, history(1, V, sampler=sampler()))
    with pytest.raises(ValueError, match=r"decay of penalties is 1\.5, expected 0 to 1"):
        history(1, V, decay=1.5)


# -------------------------------------------------------------------------------------------------- live


@pytest.mark.live
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 30},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.7},
        {"repetition_penalty": 1.7},
        {"bad_words_ids": [[5], [7, 3], [8, 7, 4], [7, 8, 6], [1, 7, 9]]},
        {"logit_bias": {3: -2.5, 4: 1.0}},
        {**ALL, "temperature": 1.5, "top_k": 100, "presence_penalty": 0, "frequency_penalty": 0},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_transformers(options, seed):
    """Each processor, and all of them in the order in which `generate` applies them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    size, text = 600, [[1, 2, 40, 8, 7]]
    config = transformers.GPT2Config(
        **{"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": size, "initializer_range": 1.0},
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    )
    theirs = {name: value for name, value in options.items() if name not in ("logit_bias", *PENALTIES)}
    bias = {(token,): float(value) for token, value in options.get("logit_bias", {}).items()} or None
    out = transformers.GPT2LMHeadModel(config).generate(
        torch.tensor(text),
        attention_mask=torch.ones(1, 5),
        generation_config=transformers.GenerationConfig(
            **{"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0, "top_k": 0} | theirs,
            **{"sequence_bias": bias, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        ),
    )
    logits_V, theirs_V = out.logits[0][0].numpy(), out.scores[0][0].numpy()
    ours_V = filtered(logits_V, history(1, size, text), **options)
    np.testing.assert_array_equal(np.isfinite(ours_V), np.isfinite(theirs_V))
    np.testing.assert_allclose(probabilities(ours_V), probabilities(theirs_V), rtol=1e-5, atol=1e-9)
    assert (probabilities(ours_V) != probabilities(logits_V)).any()


@pytest.mark.live
@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("top_p", [0.3, 0.85, 0.99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_rwkv_package(monkeypatch, temperature, top_p, top_k):
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("rwkv.utils")
    logits_V = 3 * np.random.default_rng(4).standard_normal(500, np.float32)
    drawn_from = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: drawn_from.append(p) or 0)
    utils.PIPELINE.sample_logits(None, torch.tensor(logits_V), temperature, top_p, top_k)
    ours_V = filtered(logits_V, temperature=temperature, top_p=top_p, top_k=top_k, temperature_last=True)
    np.testing.assert_allclose(probabilities(ours_V), drawn_from[0], rtol=1e-4, atol=1e-9)


@pytest.mark.live
def test_rwkv_package_penalties():
    """What its `generate` hands to `sample_logits`, over a text that it is made to write."""
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("rwkv.utils")
    logits_TV = np.random.default_rng(4).standard_normal((12, 6), np.float32)
    text, steps, seen = iter([1, 3, 3, 2, 1, 1, 5, 3, 1, 0, 0, 1]), iter(logits_TV), []

    class Pipeline(utils.PIPELINE):
        def __init__(self):
            self.model = self

        encode = staticmethod(lambda text: [4])
        decode = staticmethod(lambda tokens: "a")
        forward = staticmethod(lambda tokens, state: (torch.tensor(next(steps)), None))

        def sample_logits(self, out, **_):
            seen.append((out.numpy().copy(), next(text)))
            return seen[-1][1]

    args = utils.PIPELINE_ARGS(alpha_presence=0.3, alpha_frequency=0.7, alpha_decay=0.9, token_ban=[2])
    Pipeline().generate("x", token_count=12, args=args)
    at = history(1, 6, [[4]], decay=0.9)
    for logits_V, (expected_V, token) in zip(logits_TV, seen, strict=True):
        ours_V = scores(logits_V, at, presence_penalty=0.3, frequency_penalty=0.7, logit_bias={2: -INF})
        np.testing.assert_allclose(ours_V, expected_V, rtol=1e-5)
        at = _add(at, np.array([token], np.int32))
