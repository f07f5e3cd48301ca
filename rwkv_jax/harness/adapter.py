"""The adapter for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, package lm_eval).

    import lm_eval
    from rwkv_jax.harness import HarnessLM

    lm_eval.simple_evaluate(model=HarnessLM("RWKV-4-Pile-169M-20220807-8023.pth"), tasks=["lambada_openai"])

Conventions are those of the harness's own adapter for transformers ("hf") on a folder of `RwkvForCausalLM`:

    empty context       token 0, which ends documents, precedes the continuation
    other contexts      nothing precedes them. The scripts of the RWKV releases put one token there, 0 or a line break:
                        `add_bos_token=True`, with `prefix_token_id=187` for the latter (GPT-NeoX's id)
    rolling             token 0 before each document; documents are scored independently
    generation          ends at token 0, at a stop string, or after 256 tokens; greedy unless a task asks otherwise

The two differ in:

    length              "hf" cuts contexts to the config's `context_length`, 1,024 for RWKV-4, and long documents into
                        windows. Here the state is carried over any length, and `max_length=1024` gives the harness's
                        numbers. Models with attention get the length of their run
    beams               "hf" searches with `num_beams` of them. Here there is one, and a warning where a task asks for
                        more
    batched generation  "hf" pads on the left with tokens that transformers' RWKV reads, as it ignores the attention
                        mask: correct at batch size 1 only. Here a row does not depend on its batch
"""

import json
import logging

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from rwkv_jax import generate, interop, runs
from rwkv_jax.data import SEPARATOR
from rwkv_jax.generate.context import rows
from rwkv_jax.harness.prefixes import read_many
from rwkv_jax.harness.requests import WINDOW, batches, score
from rwkv_jax.pretrained import RWKVForCausalLM

NAME = "rwkv_jax"  # of the adapter in lm_eval's own command
# Settings of the sampler that a task may give besides the temperature; not `repetition_penalty`, which counts tokens
# of the prompt, because continuations start from contexts, which do not hold them.
SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty")


@register_model(NAME)
class HarnessLM(TemplateLM):
    """A model of lm-evaluation-harness.

    Args:
        pretrained: a path or hub name that `rwkv_jax.load` reads, or an `RWKVForCausalLM`.
        tokenizer, dtype: see `RWKVForCausalLM.from_pretrained`.
        batch_size: texts read at one time.
        max_length: tokens that the model reads of a text, the last ones; None: no limit if all layers are recurrent.
        prefix_token_id: precedes texts without a context.
        add_bos_token: whether `prefix_token_id` also precedes all other contexts.
        max_batch_size, device: ignored; `lm_eval run` always gives them. JAX_PLATFORMS chooses the device.
    """

    def __init__(
        self,
        pretrained,
        tokenizer: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool = False,
        prefix_token_id: int = SEPARATOR,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected a whole number, at least 1")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length!r}, expected at least 2")
        if isinstance(pretrained, RWKVForCausalLM):
            if (tokenizer, dtype) != (None, None):
                raise ValueError("tokenizer and dtype are for a path or a hub name, and a loaded model has its own")
            self.lm, path = pretrained, None
        else:
            path = interop.locate(str(pretrained))
            self.lm = RWKVForCausalLM.from_pretrained(path, tokenizer=tokenizer, dtype=dtype)
        if self.lm.tokenizer is None:
            raise ValueError(f"{pretrained} comes without a tokenizer, expected tokenizer=...")
        if max_length is None and not self.lm.model.recurrent:
            max_length = runs.trained_length(path) if path else runs.RELEASED_LENGTH
        if not 0 <= prefix_token_id < self.lm.model.vocab_size:
            raise ValueError(f"prefix_token_id is {prefix_token_id}, expected 0 to {self.lm.model.vocab_size - 1}")
        self.batch_size, self.max_length, self.add_bos_token = int(batch_size), max_length, add_bos_token
        self._prefix = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return SEPARATOR

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self.lm.tokenizer.encode(string)
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self._prefix, *ids] if begins and ids[:1] != [self._prefix] else ids

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        pairs = [(self._cut(ids or [self._prefix], len(following)), following) for _, ids, following in requests]
        scored = score(self.lm.model, self.lm.params, pairs, self.batch_size, progress=not disable_tqdm)
        for (texts, _, _), answer in zip(requests, scored, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [tuple(answer) for answer in scored]

    def _cut(self, context, room: int):
        """Return the longest end of the context that leaves room to predict `room` tokens."""
        if self.max_length is None:
            return context
        if room > self.max_length:
            raise ValueError(f"{room} tokens to predict, expected at most the max_length of {self.max_length}")
        return context[-(self.max_length + 1 - room) :]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(*request.args, add_special_tokens=False)
            length = self.max_length or max(len(ids), 1)
            pairs = utils.get_rolling_token_windows(ids, self._prefix, length, context_len=1)
            windows += [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            owners += [owner] * (len(windows) - len(owners))
        log_p = [0.0] * len(requests)
        for owner, (of_window, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            log_p[owner] += of_window
        for request, answer in zip(requests, log_p, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return log_p

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked = [(i, self.tok_encode(request.args[0]) or [self._prefix]) for i, request in enumerate(requests)]
        settings = [_settings(request.args[1]) for request in requests]
        texts = {}
        kinds = {json.dumps([sampling, stop]): (sampling, stop) for sampling, stop, _ in settings}
        with tqdm(desc="generated", total=len(requests), disable=True if disable_tqdm else None) as bar:
            for kind in kinds.values():
                same = [(self._cut(ids, 1 + settings[i][2]), i) for i, ids in asked if settings[i][:2] == kind]
                same.sort()  # texts with shared prefixes together
                for window in batches(same, WINDOW * self.batch_size):
                    after = read_many(self.lm.model, self.lm.params, [ids for ids, _ in window], self.batch_size)
                    for batch in batches([(row, i) for row, (_, i) in enumerate(window)], self.batch_size):
                        texts |= self._continue(after, batch, *kind, settings)
                        bar.update(len(batch))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _continue(self, after, batch, sampling: dict, stop: list[str], settings) -> dict[int, str]:
        """Return the continuations of rows of a context, by request; rows without new tokens pad the batch."""
        spare = self.batch_size - len(batch)
        result = generate.generate_texts(
            self.lm.model,
            self.lm.params,
            [[]] * self.batch_size,
            self.lm.tokenizer,
            context=rows(after, [row for row, _ in batch] + [0] * spare),
            max_new_tokens=[settings[i][2] for _, i in batch] + [0] * spare,
            seed=[i for _, i in batch] + [0] * spare,
            stop=stop,
            **sampling,
        )
        return dict(zip([i for _, i in batch], result.texts, strict=False))


def _settings(asked: dict) -> tuple[dict, list[str], int]:
    """Return (settings of the sampler, stop strings, most new tokens) from a task's generation_kwargs."""
    asked = {"temperature": 1.0, "num_beams": 1} | normalize_gen_kwargs(asked, default_max_gen_toks=256)
    stop, count = [string for string in asked.pop("until") if string], asked.pop("max_gen_toks")
    num_beams, do_sample, temperature = asked.pop("num_beams"), asked.pop("do_sample"), asked.pop("temperature")
    if num_beams != 1:
        what = f"num_beams is {num_beams}, read as 1: the numbers are not those of a beam search"
        utils.warning_once(logging.getLogger(__name__), what)
    sampling = {"temperature": temperature if do_sample else 0.0}
    sampling |= {name: asked.pop(name) for name in SAMPLING if name in asked}
    if asked:
        known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", "num_beams", *SAMPLING))
        raise ValueError(f"generation_kwargs hold {next(iter(asked))}, expected some of {known}")
    return sampling, stop, count
