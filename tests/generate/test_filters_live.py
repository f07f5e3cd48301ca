"""The filters of samplers against those of transformers and the rwkv package."""

import numpy as np
import pytest
from logits import ALL, INF, distribution, probabilities

from rwkv_jax.generate import filters
from rwkv_jax.generate.sampling import history, sampler

pytestmark = pytest.mark.live
LIVE = "needs requirements-live.txt"
PENALTIES = ("presence_penalty", "frequency_penalty")


def filtered(logits_V, history_=None, **options):
    """The distribution [V] that a sampler draws from."""
    return np.asarray(distribution(sampler(**options), logits_V[None], history_)[0])


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
def test_filters_equal_those_of_transformers(options, seed):
    """Each processor, and all of them in the order in which `generate` applies them."""
    torch = pytest.importorskip("torch", reason=LIVE)
    transformers = pytest.importorskip("transformers", reason=LIVE)
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


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("top_p", [0.3, 0.85, 0.99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filters_equal_those_of_the_rwkv_package(monkeypatch, temperature, top_p, top_k):
    torch, utils = pytest.importorskip("torch", reason=LIVE), pytest.importorskip("rwkv.utils", reason=LIVE)
    logits_V = 3 * np.random.default_rng(4).standard_normal(500, np.float32)
    drawn_from = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: drawn_from.append(p) or 0)
    utils.PIPELINE.sample_logits(None, torch.tensor(logits_V), temperature, top_p, top_k)
    ours_V = filtered(logits_V, temperature=temperature, top_p=top_p, top_k=top_k, temperature_last=True)
    np.testing.assert_allclose(probabilities(ours_V), drawn_from[0], rtol=1e-4, atol=1e-9)


def test_penalties_equal_those_of_the_rwkv_package():
    """What its `generate` hands to `sample_logits`, over a text that it is made to write."""
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
    at = history(1, 6, [[4]], decay=0.9)
    settings = sampler(presence_penalty=0.3, frequency_penalty=0.7, logit_bias={2: -INF}).keywords
    for logits_V, (expected_V, token) in zip(logits_TV, seen, strict=True):
        np.testing.assert_allclose(filters.scores(logits_V[None], at, settings)[0], expected_V, rtol=1e-5)
        at = at.add(np.array([token], np.int32))
