"""Generation of text from text: streams, batches and stop strings.

A stop string may begin and end within a token. Text that may begin one is held back. When a string is complete its
tokens have already been read, so the context is rebuilt from the end of the prompts. If the string begins within a
token, the token's first characters are kept, and encoded again as the continuation of a text.
"""

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rwkv_jax.data import tokenizers
from rwkv_jax.generate.context import Context, begin, check
from rwkv_jax.generate.decode import DISPATCH, advance, as_prompts, checked_draws, prefill
from rwkv_jax.models import per_layer

ANCHORS = ("\n", ".", "|", "~")  # which tokenizers rarely merge with the text after them


class StoppedText:
    """Incremental text of tokens, up to the first stop string.

    Attributes:
        tokens: the tokens of the text. The text returned so far is a prefix of `decode(tokens)`, and equals it at the
            end. The rest is held back: an incomplete character, or what may begin a stop string.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokens: list[int] = []
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = tokenizers.TextStream(tokenizer)
        self._pieces: list[str] = []
        self._ends: list[int] = []  # characters of the text after each token
        self._held = ""

    def extend(self, tokens: Sequence[int], is_end: bool) -> str:
        """Return the text that `tokens` add and no stop string can remove; all of it if they are the last ones."""
        added = ""
        for token in tokens:
            added += self.push(token)
            if self.stopped:
                return added
        return added + self.flush() if is_end and not self.stopped else added

    def push(self, token: int) -> str:
        """Return the text that `token` adds and no stop string can remove."""
        piece = self._stream.push(token)
        self.tokens.append(token)
        self._pieces.append(piece)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(piece))
        self._held += piece
        found = [place for string in self._stop if (place := self._held.find(string)) >= 0]
        sure = min(found, default=len(self._held) - self._could_begin_a_stop())
        if found:
            self._cut(self._ends[-1] - len(self._held) + sure)
        shown, self._held = self._held[:sure], self._held[sure:]
        return shown

    def flush(self) -> str:
        """Return the rest of the text after the last token. An incomplete character is U+FFFD."""
        rest, self._held = self._held + self._stream.flush(), ""
        return rest

    def _could_begin_a_stop(self) -> int:
        """Return the length of the longest suffix of the held text with which a stop string begins."""
        lengths = (n for string in self._stop for n in range(1, len(string)) if self._held.endswith(string[:n]))
        return max(lengths, default=0)

    def _cut(self, place: int) -> None:
        """Keep the first `place` characters, with the fewest tokens that make them."""
        self.stopped = True
        whole = bisect_right(self._ends, place)
        end = self._ends[whole - 1] if whole else 0
        num_kept = bisect_left(self._ends, end) + 1 if end else 0
        cut = self.tokens[num_kept : whole + 1] if end < place else []
        self.tokens = self.tokens[:num_kept]
        if cut:
            self.tokens += self._beginning(cut, "".join(self._pieces)[end : self._ends[whole]], place - end)

    def _beginning(self, cut: list[int], piece: str, length: int) -> list[int]:
        """Return tokens of the first `length` characters of `piece`, the text of the tokens `cut`.

        They are checked as a continuation, here of `cut` itself: a tokenizer may prepend a space to a text that it
        encodes, and strip one from a text that it decodes.
        """
        encode, decode = self._tokenizer.encode, self._tokenizer.decode
        before = decode(cut)
        following = decode(cut + cut)[len(before) :]
        text = following.removesuffix(piece) + piece[:length] if following.endswith(piece) else piece[:length]
        for anchor in ("", *ANCHORS):
            with contextlib.suppress(ValueError):  # the tokenizer may lack an anchor
                tokens = encode(anchor + text)[len(encode(anchor)) :]
                if decode(cut + tokens) == before + text:
                    return tokens
        return encode(piece[:length])


class Texts:
    """Continuations of B texts. Arguments are checked at construction; prompts are read on first use.

    The context after the prompts is kept beside the current one, so caches of attention take twice their memory.
    """

    def __init__(self, model, params, prompts, tokenizer, *, context=None, stop=(), **settings):
        check_tokenizer(tokenizer, model)
        self._model, self._params = per_layer(model, params)
        ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        self._prompts, single = as_prompts(ids, model.vocab_size, context)
        if single or isinstance(prompts, str):
            raise ValueError(f"the prompts are {prompts!r}, expected a list of texts")
        if context is not None:
            check(self._model, context, len(ids))
        self._draws = checked_draws(self._prompts, model.vocab_size, **settings)
        stop = stop_strings(stop)
        self._outputs = [StoppedText(tokenizer, stop) for _ in ids]
        self._given = context
        self._after_prompts = self._context = None
        self.finished = False

    @property
    def tokens(self) -> list[list[int]]:
        return [list(output.tokens) for output in self._outputs]

    @property
    def context(self) -> Context:
        """A copy of the context after the prompts and exactly `tokens`, also after an interruption."""
        self._read_prompts()
        if self._context is None or any(output.stopped for output in self._outputs):
            tokens = [np.array(output.tokens, np.int32) for output in self._outputs]
            return prefill(self._model, self._params, tokens, self._after_prompts)
        return begin(self._model, self._context, len(self._prompts), room=0)

    def advance(self, count: int = DISPATCH) -> list[str]:
        """Draw at most `count` further tokens, up to `DISPATCH`; return what `StoppedText` releases of each text."""
        self._read_prompts()
        context, self._context, self.finished = self._context, None, True  # an interruption loses the donated arrays
        new, context, draws = advance(self._model, self._params, context, self._draws, count)
        pieces = [
            output.extend(tokens, is_end=left == 0)
            for output, tokens, left in zip(self._outputs, new, draws.left_B, strict=True)
        ]
        stopped_B = np.array([output.stopped for output in self._outputs])
        self._draws = replace(draws, left_B=np.where(stopped_B, 0, draws.left_B))
        self._context, self.finished = context, not self._draws.left_B.any()
        return pieces

    def _read_prompts(self) -> None:
        if self._after_prompts is None:
            after = prefill(self._model, self._params, self._prompts, self._given)
            current = begin(self._model, after, len(self._prompts), self._draws.room)
            self._after_prompts, self._context = after, current


class Stream:
    """An iterator over the pieces of a continuation; none ends within a UTF-8 character.

    Nothing is computed ahead. The attributes are valid at any time, also after an interruption:

    Attributes:
        text: the pieces that were yielded.
        tokens: the tokens of `text` and of what is held back, see `StoppedText`.
        context: a copy of the context after the prompt and exactly `tokens`.
    """

    def __init__(self, texts: Texts):
        self._texts = texts
        self.text = ""

    @property
    def tokens(self) -> list[int]:
        return self._texts.tokens[0]

    @property
    def context(self) -> Context:
        return self._texts.context

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._texts.finished:
            if piece := self._texts.advance(1)[0]:
                self.text += piece
                return piece
        raise StopIteration


class Result(NamedTuple):
    texts: list[str]
    tokens: list[list[int]]
    context: Context


def stream(model, params, prompt_text: str, tokenizer, **settings) -> Stream:
    """Return an iterator over the text of `generate`, in pieces as tokens are drawn.

    Args:
        prompt_text: if empty, the text continues the context, or begins a document.
        stop: strings of which the first found ends the text; neither it nor what follows is part of the result.
        settings: those of `generate`.
    """
    return Stream(Texts(model, params, [prompt_text], tokenizer, **settings))


def generate_texts(model, params, prompts: Sequence[str], tokenizer, **settings) -> Result:
    """Return texts that continue the prompts, their tokens, and the context after prompts and tokens.

    Args:
        prompts: texts, or lists of ids.
        stop, settings: those of `stream`; max_new_tokens, seed and start may be a number for each row.
    """
    texts = Texts(model, params, prompts, tokenizer, **settings)
    pieces = [[] for _ in prompts]
    while not texts.finished:
        for row, piece in zip(pieces, texts.advance(), strict=True):
            row.append(piece)
    return Result(["".join(row) for row in pieces], texts.tokens, texts.context)


def stop_strings(stop) -> tuple[str, ...]:
    """Return the stop strings from one or several; ValueError if one is empty or not a string."""
    strings = (stop,) if isinstance(stop, str) or not np.iterable(stop) else tuple(stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop is {stop!r}, expected one or several strings that are not empty")
    return strings


def check_tokenizer(tokenizer, model) -> None:
    """Raise ValueError if the model may draw ids that the tokenizer cannot decode, or lacks ids that it encodes.

    The byte tokenizer decodes bytes only; others skip the ids that a padded vocabulary has beyond theirs.
    """
    V, vocab_size = model.vocab_size, tokenizer.vocab_size
    if vocab_size > V or (tokenizer.name == "bytes" and vocab_size < V):
        raise ValueError(
            f"tokenizer {tokenizer.name} has {vocab_size} tokens, the model {V}: expected the model's own"
        )
