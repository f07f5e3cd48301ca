"""Filters of samplers against a float64 transcription of their definitions, transformers and the rwkv package."""

import jax
import numpy as np
import pytest
from scipy import special

from rwkv_jax.generate import filters
from rwkv_jax.generate.sampling import history, sampler

V, INF = 3 * filters.LANES + 7, np.inf
LIVE = "needs requirements-live.txt"
PENALTIES = ("presence_penalty", "frequency_penalty")  # not in transformers
_add = jax.jit(lambda history, tokens_B: history.add(tokens_B))


@jax.jit
def filtered(sampler, logits_BV, history):
    """(scores, scores after the filters of the distribution), [B, V] both."""
    scores_BV = filters.scores(logits_BV, history, sampler.keywords)
    return scores_BV, filters.truncated(scores_BV, sampler.keywords)


def hard_logits():
    """[7, V]: without ties, with ties, spread, one-hot, half of them banned, all equal, and few."""
    rng = np.random.default_rng(3)
    smooth, spread = 2 * rng.standard_normal(V), 12 * rng.standard_normal(V)
    tied, banned, few = np.round(8 * smooth) / 8, np.round(spread), np.full(V, -INF)
    banned[rng.random(V) < 0.5] = -INF
    few[600:624] = rng.choice([-0.0, 0.0, 1.0, 2.5], 24)
    return np.float32([smooth, tied, spread, 50.0 * (np.arange(V) == 700), banned, np.zeros(V), few])


def written_texts():
    """(prompt, continuation) for each row, of five tokens that repeat."""
    rng = np.random.default_rng(4)
    return [(rng.integers(0, 5, n).tolist(), rng.integers(0, 5, 6).tolist()) for n in (5, 0, 1, 16, 20, 3, 40)]


LOGITS_BV, TEXTS = hard_logits(), written_texts()
DECAY_B = np.float32([1, 0.5, 0.9, 0, 0.99, 1, 0.3])


def history_of_texts():
    at = history([prompt for prompt, _ in TEXTS], V, DECAY_B)
    for tokens_B in np.int32([new for _, new in TEXTS]).T:
        at = _add(at, tokens_B)
    return at


def transcribed_scores(logits_V, prompt, new, decay, settings):
    x_V, written = np.float64(logits_V), prompt + new
    for token, bias in settings.get("logit_bias", {}).items():
        x_V[token] += bias
    for token in set(written):
        penalty = settings.get("repetition_penalty", 1)
        x_V[token] = x_V[token] / penalty if x_V[token] > 0 else x_V[token] * penalty
    for token in set(new):
        count = sum(float(decay) ** age for age, other in enumerate(reversed(new)) if other == token)
        x_V[token] -= settings.get("presence_penalty", 0) + settings.get("frequency_penalty", 0) * count
    for *before, last in settings.get("bad_words_ids", []):
        if written[max(len(written) - len(before), 0) :] == before:
            x_V[last] = -INF
    return x_V


def transcribed_filters(x_V, settings):
    """The logits that the filters keep of scores in float32, since order and ties matter."""
    temperature, is_last = settings.get("temperature", 1), "temperature_last" in settings
    likeliest_first = np.argsort(-x_V, kind="stable")
    z_V = np.float64(x_V) / (1 if is_last else temperature)
    for name in ("top_p", "top_k") if is_last else ("top_k", "top_p"):
        if name == "top_k" and name in settings:
            z_V = only(likeliest_first[: settings[name]], z_V)
        elif name in settings:
            z_V = only(fewest(likeliest_first, special.softmax(z_V), settings[name]), z_V)
    if "min_p" in settings:
        p_V = special.softmax(z_V)
        z_V = np.where(p_V >= settings["min_p"] * p_V.max(), z_V, -INF)
    if "typical_p" in settings:
        p_V, surprise_V = special.softmax(z_V), -special.log_softmax(z_V)
        distance_V = np.abs(surprise_V - special.entr(p_V).sum())
        z_V = only(fewest(np.argsort(distance_V, kind="stable"), p_V, settings["typical_p"]), z_V)
    return z_V / (temperature if is_last else 1)


def only(kept, z_V):
    out_V = np.full_like(z_V, -INF)
    out_V[kept] = z_V[kept]
    return out_V


def fewest(order, p_V, share):
    """The shortest prefix of an order whose probability reaches a share."""
    sum_V = np.cumsum(p_V[order])
    assert np.abs(sum_V - share).min() > 1e-7, "float32 may fall on either side: take another share"
    return order[: np.searchsorted(sum_V, share) + 1]


def every_setting(seed, **more):
    rng = np.random.default_rng(seed)
    ends = [prompt + new for prompt, new in TEXTS]
    return {
        "temperature": rng.choice([0.3, 0.8, 2.5]),
        "top_k": int(rng.choice([1, 2, 40, 700, V])),
        "top_p": rng.uniform(0.3, 1),
        "min_p": 10 ** rng.uniform(-6, -0.5),
        "typical_p": rng.uniform(0.2, 1),
        "repetition_penalty": rng.uniform(0.5, 2),
        "presence_penalty": rng.uniform(-1, 2),
        "frequency_penalty": rng.uniform(-1, 2),
        "logit_bias": {seed: -INF, 4: rng.uniform(-3, 3), 700: 1.0},
        "bad_words_ids": [[*text[-n:], 3][-16:] for text, n in zip(ends, (1, 2, 3, 16, 15, 9, 4), strict=True)],
    } | more


SETTINGS = {  # one compiled function for each entry
    "temperature": [{"temperature": t} for t in (0.25, 1.0, 3.0)],
    "top_k": [{"top_k": k} for k in (1, 3, 40, 700, 1100, V + 3)],
    "top_p": [{"top_p": p} for p in (0.01, 0.31, 0.87, 0.997)],
    "min_p": [{"min_p": p} for p in (1e-5, 0.03, 0.4, 0.9)],
    "typical_p": [{"typical_p": p} for p in (0.01, 0.31, 0.87, 0.997)],
    "penalties": [{"presence_penalty": 0.5, "frequency_penalty": f} for f in (2.0, -1.0)],
    "all": [every_setting(seed) for seed in range(8)],
    "all, temperature last": [every_setting(seed, temperature_last=True) for seed in range(8)],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_filters_equal_a_float64_transcription(name):
    at = history_of_texts()
    for settings in SETTINGS[name]:
        scores_BV, left_BV = map(np.asarray, filtered(sampler(**settings), LOGITS_BV, at))
        for logits_V, text, decay, scores_V, left_V in zip(LOGITS_BV, TEXTS, DECAY_B, scores_BV, left_BV, strict=True):
            expected_V = transcribed_scores(logits_V, *text, decay, settings)
            np.testing.assert_allclose(scores_V, expected_V, rtol=1e-6, atol=1e-6)
            expected_V = transcribed_filters(scores_V, settings)
            np.testing.assert_array_equal(np.isfinite(left_V), np.isfinite(expected_V))
            np.testing.assert_allclose(left_V, expected_V - expected_V.max(), rtol=1e-5, atol=1e-5)
            assert left_V.max() == 0  # otherwise a small temperature applied last overflows


def test_history_keeps_the_presence_of_a_decayed_token():
    at = history([[]], 4, decay=0.01)
    for token in [1] + [2] * 60:
        at = _add(at, np.int32([token]))
    assert (np.asarray(at.counts_BV)[0] > 0).tolist() == [False, True, True, False]


def test_history_holds_only_the_counts_that_its_sampler_reads():
    def leaves(**settings):
        at = jax.eval_shape(history([[1], [2]], V, sampler=sampler(**settings)).add, np.zeros(2, np.int32))
        return {name for name, leaf in at._asdict().items() if leaf is not None}

    assert leaves(top_p=0.5, logit_bias={1: 1.0}) == set()
    assert leaves(repetition_penalty=1.5) == {"seen_BV"}
    assert leaves(presence_penalty=1.5) == leaves(frequency_penalty=1) == {"counts_BV", "decay_B"}
    assert leaves(temperature=0, bad_words_ids=[[1]]) == {"recent_BR"}
    assert all(leaf is not None for leaf in history([[]], V, sampler=lambda *_: None))
    with pytest.raises(ValueError, match="presence_penalty needs the history's counts_BV, which is None"):
        sampler(presence_penalty=1)(np.zeros((1, V)), None, history([[]], V, sampler=sampler()))


# -------------------------------------------------------------------------------------------------- other packages


def left_of(logits_V, history=None, **settings):
    """The probabilities [V] that a sampler draws from."""
    return special.softmax(np.float64(filtered(sampler(**settings), logits_V[None], history)[1][0]))


@pytest.mark.live
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 30},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.7},
        {"repetition_penalty": 1.7},
        {"bad_words_ids": [[5], [7, 3], [8, 7, 4], [7, 8, 6], [1, 7, 9]]},
        {"logit_bias": {3: -2.5, 4: 1.0}},
        every_setting(0, top_k=100) | dict.fromkeys(PENALTIES, 0),
    ],
    ids=lambda settings: next(iter(settings)) if len(settings) == 1 else "all",
)
def test_filters_equal_those_of_transformers(settings):
    """Compares each processor alone, and all of them in the order in which `generate` applies them."""
    torch = pytest.importorskip("torch", reason=LIVE)
    transformers = pytest.importorskip("transformers", reason=LIVE)
    torch.manual_seed(0)
    text = [[1, 2, 40, 8, 7]]
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": V, "initializer_range": 1.0}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    theirs = {name: value for name, value in settings.items() if name not in ("logit_bias", *PENALTIES)}
    bias = {(token,): float(value) for token, value in settings.get("logit_bias", {}).items()}
    asked = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0, "top_k": 0, "sequence_bias": bias or None}
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = transformers.GPT2LMHeadModel(config).generate(
        torch.tensor(text),
        attention_mask=torch.ones(1, 5),
        generation_config=transformers.GenerationConfig(**asked | theirs | outputs),
    )
    logits_V, theirs_V = out.logits[0][0].numpy(), special.softmax(np.float64(out.scores[0][0].numpy()))
    ours_V = left_of(logits_V, history(text, V), **settings)
    np.testing.assert_array_equal(ours_V > 0, theirs_V > 0)
    np.testing.assert_allclose(ours_V, theirs_V, rtol=1e-5, atol=1e-9)
    assert (ours_V != special.softmax(np.float64(logits_V))).any()


@pytest.mark.live
@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filters_equal_those_of_the_rwkv_package(monkeypatch, temperature, top_k):
    torch, utils = pytest.importorskip("torch", reason=LIVE), pytest.importorskip("rwkv.utils", reason=LIVE)
    logits_V, drawn_from = 3 * np.random.default_rng(4).standard_normal(500, np.float32), []
    monkeypatch.setattr(np.random, "choice", lambda a, p: drawn_from.append(p) or 0)
    for top_p in (0.3, 0.85, 0.99):
        utils.PIPELINE.sample_logits(None, torch.tensor(logits_V), temperature, top_p, top_k)
        ours_V = left_of(logits_V, temperature=temperature, top_p=top_p, top_k=top_k, temperature_last=True)
        np.testing.assert_allclose(ours_V, drawn_from.pop(), rtol=1e-4, atol=1e-9)


@pytest.mark.live
def test_penalties_equal_those_of_the_rwkv_package():
    """Compares the logits that its `generate` passes to `sample_logits` while it writes a given text."""
    torch, utils = pytest.importorskip("torch", reason=LIVE), pytest.importorskip("rwkv.utils", reason=LIVE)
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
    at = history([[4]], 6, decay=0.9)
    ours = sampler(presence_penalty=0.3, frequency_penalty=0.7, logit_bias={2: -INF})
    for logits_V, (expected_V, token) in zip(logits_TV, seen, strict=True):
        np.testing.assert_allclose(filtered(ours, logits_V[None], at)[0][0], expected_V, rtol=1e-5)
        at = _add(at, np.int32([token]))
