"""How many programs reading and drawing compile."""

import pytest
from generating import ids, unstacked

from rwkv_jax import RWKVForCausalLM
from rwkv_jax.data import tokenizers
from rwkv_jax.generate.decode import FIRST_CHUNKS

LENGTHS = (1, 2, 5, 15, 16, 17, 31, 48, 64, 65, 100, 255, 256, 257, 300, 511, 512, 513, 530, 600)


def test_generate_compiles_few_programs_whatever_the_prompt_and_the_settings(compiled):
    """A prefill for each length of a first chunk and one program that decodes; beside them small ones, which make an
    empty context, keys and copies. Once these are compiled nothing else is."""
    lm = RWKVForCausalLM(*unstacked("rwkv4"), tokenizers.get_tokenizer("bytes"))

    def use(lengths, **settings):
        for length in lengths:
            prompt = [token % 128 for token in ids(length, seed=length)]
            text, num_new = bytes(prompt).decode(), length % 7 + 1
            assert len(lm.generate(prompt, max_new_tokens=num_new, **settings)) <= num_new
            lm.generate(prompt, context=lm.read(text), max_new_tokens=40, **settings)
            streamed = lm.stream(text, max_new_tokens=3, **settings)
            assert len(list(streamed)) <= 3 and streamed.context is not None

    compiled()
    use(FIRST_CHUNKS, stop_tokens=())
    assert compiled() <= len(FIRST_CHUNKS) + 1 + 5
    for seed, settings in enumerate(({}, {"temperature": 0.7}, {"temperature": 1.3, "penalty_decay": 0.5})):
        use(LENGTHS, seed=seed, stop_tokens=range(200, 200 + seed), **settings)
    assert compiled() == 0
    tokens = lm.generate([1], max_new_tokens=300, seed=[3], start=[5], stop_tokens=())
    assert len(tokens) == 300 and compiled() <= 1  # keys of a list of seeds


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rwkv4", "transformer"])
def test_filters_and_lengths_of_caches_compile_once(kind, compiled):
    lm = RWKVForCausalLM(*unstacked(kind), tokenizers.get_tokenizer("bytes"))
    lengths = [length for length in LENGTHS if length <= 256 - 40] if kind == "transformer" else LENGTHS

    def use(**settings):
        for length in lengths:
            lm.generate(ids(length), max_new_tokens=40, stop_tokens=(), **settings)
            found, _ = lm.logits(ids(length))
            assert found.shape == (length, 256)

    compiled()
    use(temperature=0.7, top_p=0.9)
    assert compiled() <= 2 * len(FIRST_CHUNKS) + 1 + 5
    use(temperature=0.5, top_p=0.8, seed=3)
    assert compiled() == 0
