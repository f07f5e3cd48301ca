"""The object interface: a model, its parameters and its tokenizer in one value.

    lm = rwkv_jax.RWKVForCausalLM.from_pretrained("RWKV/rwkv-4-169m-pile")
    lm.generate("In a shocking finding,", max_new_tokens=40, temperature=0.8, top_p=0.9)

The object is stateless. A `Context` holds the recurrent state: `read` returns one, every method takes one, and using
one twice forks it. The calls of Production-RWKV's RWKV_RNN_Model and those here:

    RWKVRNN4NeoForCausalLM.from_pretrained(name)    from_pretrained(path or hub name): sizes come from the file
    RWKVTokenizer.default(), .from_file(path)       from_pretrained(..., tokenizer=path), lm.tokenizer
    half("bf16"), half("fp16"), full()              from_pretrained(..., dtype="bfloat16", "float16" or "float32")
    cuda(), cpu()                                   from_pretrained(..., sharding=a jax.sharding.Sharding)
    warmup_with_context(ids)                        context = lm.read(ids)
    generate([]) after it                           lm.generate("", context=context)
    update_state_after_generation(True)             text, context = lm.generate(..., return_context=True)
    clear_memory()                                  another context, or none
    save_context(path, text), load_context(path)    lm.save_context(path, context, text), lm.load_context(path)
    generate(streaming_callback=f)                  for text in lm.stream(...): f(text), and break to stop
    should_return_full_context(True)                prompt + lm.generate(prompt)
    max_length, stop_on_eos                         max_new_tokens, stop_tokens=(0,), which is the default
    temperature, top_p, top_k                       the same
    repetition_penalty=0                            the same name; 1 is off
    bad_words_ids                                   the same name; here it bans them
    force_words_ids                                 absent; there it had no effect
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import evaluate, generate, interop, runs
from rwkv_jax.data import SEPARATOR, tokenizers
from rwkv_jax.generate.context import Context, begin
from rwkv_jax.generate.decode import checked_ids, chunks
from rwkv_jax.generate.text import Stream


@dataclass(frozen=True)
class RWKVForCausalLM:
    """A language model over text: model, parameters (one set a layer) and tokenizer. Text may be given as ids, too.

    `tokenizer` None: only ids can be read and written.
    """

    model: nn.Module
    params: Any
    tokenizer: tokenizers.Tokenizer | None = None
    training: dict | None = None  # what is known of it, for the model card: see `runs.load_with_training`

    @classmethod
    def from_pretrained(
        cls, path_or_name, tokenizer: str | None = None, dtype: str | None = None, sharding: Any = None
    ) -> "RWKVForCausalLM":
        """Load what `rwkv_jax.load` reads: a released .pth, a folder, a training run, or a name on Hugging Face's hub.

        Args:
            tokenizer: "bytes", "world", or a file; None: the model's own, else a guess from the size of its
                vocabulary. A line on stderr names the guess, or says that there is no tokenizer.
            dtype: "float32", "bfloat16" or "float16"; None: the file's.
            sharding: of the parameters, see `rwkv_jax.load`.

        Raises:
            OSError, ValueError: as from `rwkv_jax.load`, or the tokenizer that was named cannot be read, or has more
                tokens than the model.
        """
        path = interop.locate(path_or_name)
        model, params, training = runs.load_with_training(path, dtype=dtype, sharding=sharding, scan=False)
        if tokenizer is None:
            found = tokenizers.known_for_model(path, model.vocab_size)
        else:
            found = tokenizers.for_model(path, model.vocab_size, tokenizer)
        if found is not None:
            tokenizers.warn_if_small(found.name, found.vocab_size, model.vocab_size)
        return cls(model, params, found, training)

    def save_pretrained(self, folder) -> None:
        """Write weights, sizes and tokenizer to a folder that `from_pretrained` and transformers read.

        A README.md, the model card, has what is known of the model. Somebody else's README.md stays.

        Raises:
            ValueError: the model is not a released form of RWKV-4 or 7, see `interop.save`.
            OSError: the folder cannot be written, or holds something else.
        """
        about = {"training": self.training, "tokenizer": self.tokenizer}
        interop.save(folder, self.model, self.params, format="huggingface", **about)

    def generate(self, prompt="", *, return_context: bool = False, **settings):
        """Continue the prompt; return text for a text, ids for ids, a list for a list of either.

        Args:
            prompt: if empty, the text continues the context, or begins a document.
            context: a `Context` that the prompt continues; it is not changed.
            max_new_tokens: most new tokens, by default 100; one number, or one for each prompt.
            temperature: by default 1; 0 is greedy. Further settings: those of `generate.sampling.sampler`, and
                penalty_decay; or `sampler`, a function of your own.
            seed: by default 0; one number, or one for each prompt.
            stop: strings that end the text; they are not part of it.
            stop_tokens: ids that do the same. By default the separator, 0, after which another document begins.
            return_context: whether to return (the result, the context after the prompt and exactly the result).
        """
        prompts, single, is_text = self._prompts(prompt)
        args = self.model, self.params, prompts
        if is_text or "stop" in settings:
            texts, ids, context = generate.generate_texts(*args, self._tokenizer(), **settings)
            results = texts if is_text else ids
        else:
            results, context = generate.generate_with_context(*args, **settings)
        results = results[0] if single else results
        return (results, context) if return_context else results

    def stream(self, prompt="", **settings) -> Stream:
        """Return an iterator over the text of `generate` in pieces, see `generate.text.Stream`."""
        return generate.stream(self.model, self.params, prompt, self._tokenizer(), **settings)

    def read(self, text, context: Context | None = None) -> Context:
        """Return the context after a text, or after each of several. Its size does not grow with an RWKV's text."""
        prompts, _, _ = self._prompts(text)
        return generate.read(self.model, self.params, prompts, context)

    def logits(self, text, context: Context | None = None) -> tuple[Any, Context]:
        """Return the logits [T, V] after each token of a text, NumPy, float32 at least, and the context after it.

        Compiled, unlike `model.apply`. A list for a list. An empty text without a context is the separator.
        """
        texts, single, _ = self._prompts(text)
        found, context = generate.logits(self.model, self.params, texts, context)
        return (found[0] if single else found), context

    def score(self, text, context: Context | None = None):
        """Return log p of every token of a text given all before it: nats, float32 [N], whose sum is the text's.

        A list for a list. Without a context the text is a document from its beginning. Memory does not grow with the
        text. `evaluate.bits_per_byte(-scores, num_bytes)` and `evaluate.perplexity(-scores)` reduce it.
        """
        texts, single, _ = self._prompts(text)
        if context is None:
            context = self.read([[SEPARATOR]] * len(texts))
        context = begin(self.model, context, len(texts), room=max(map(len, texts)))
        scored = evaluate.continuations(self.model, self.params, texts, context.logits_BV, context.state)
        log_p = [log_p_N for log_p_N, _ in scored]
        return log_p[0] if single else log_p

    def embed(self, text, context: Context | None = None) -> np.ndarray:
        """Return the mean over tokens of the activations after the final norm: float32 [D], or [B, D] for a list."""
        texts, single, _ = self._prompts(text)
        lengths = [len(ids) for ids in texts]
        if min(lengths) == 0:
            raise ValueError("nothing to embed in an empty text, expected at least one token")
        state = begin(self.model, context, len(texts), room=max(lengths)).state
        total_BD = 0
        for tokens_BT, valid_BT, _ in chunks(texts):
            sum_BD, state = _sum_of_hidden(self.model, self.params, tokens_BT, valid_BT, state)
            total_BD = total_BD + np.asarray(sum_BD)
        mean_BD = total_BD / np.array(lengths, np.float32)[:, None]
        return mean_BD[0] if single else mean_BD

    def save_context(self, path, context: Context, text: str | None = None) -> None:
        """Write a context, and the text that it has read, to a file that only this model accepts."""
        generate.save_context(path, context, self.model, self.params, text)

    def load_context(self, path) -> tuple[Context, str | None]:
        """Return the context and the text that `save_context` wrote."""
        return generate.load_context(path, self.model, self.params)

    def _tokenizer(self) -> tokenizers.Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this model was loaded without a tokenizer, expected ids or from_pretrained(tokenizer=...)"
            )
        return self.tokenizer

    def _prompts(self, given) -> tuple[list, bool, bool]:
        """Return the ids of each prompt, whether a single one was given, and whether they are texts."""
        single = isinstance(given, str) or not any(isinstance(one, str) or np.ndim(one) for one in given)
        prompts = [given] if single else list(given)
        is_text = [isinstance(prompt, str) for prompt in prompts]
        if any(is_text) and not all(is_text):
            raise ValueError("the prompts are texts and ids, expected one or the other")
        ids = [self._tokenizer().encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return [checked_ids(one, self.model.vocab_size) for one in ids], single, all(is_text)


@partial(jax.jit, static_argnums=0)
def _sum_of_hidden(model, params, tokens_BT, valid_BT, state):
    x_BTD, state = model.apply({"params": params}, tokens_BT, state, valid_BT=valid_BT, method="hidden")
    return jnp.where(valid_BT[..., None], x_BTD, 0).sum(axis=1, dtype=jnp.float32), state
