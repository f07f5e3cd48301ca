"""Texts that continue texts: streams that can be stopped, batches, and stop strings.

A stop string may begin and end anywhere, within tokens and across them. What could be the beginning of one is held
back until it is known not to be. When one is found, tokens after its beginning have already been read: the row goes
back to a copy of its state from before them and reads again what stays, so that its context has read exactly its text.
Where the string begins within a token, the token's first characters stay: they are encoded anew.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rwkv_jax import tokenizers
from rwkv_jax.generate.context import Context, copy, go_back, mark, with_room
from rwkv_jax.generate.decode import DISPATCH, advance, as_prompts, prepare, read, read_on
from rwkv_jax.models import per_layer


class StoppedText:
    """The text of tokens that come one at a time, up to the first stop string.

    Attributes:
        tokens: those whose text counts. What was returned so far is the beginning of `decode(tokens)`, and all of it
            at the end; what lacks before is an incomplete character, or what may be the beginning of a stop string.
        stopped: whether a stop string was found.
        settled: number of first tokens that no stop string can take back.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokens: list[int] = []
        self.stopped, self.settled = False, 0
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = tokenizers.TextStream(tokenizer)
        self._pieces: list[str] = []
        self._ends: list[int] = []  # characters of the text after each token
        self._held = ""

    def push(self, token: int) -> str:
        """What `token` adds to the text for sure."""
        piece = self._stream.push(token)
        self.tokens.append(token)
        self._pieces.append(piece)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(piece))
        self._held += piece
        found = min((place for string in self._stop if (place := self._held.find(string)) >= 0), default=None)
        if found is None:
            sure = len(self._held) - self._could_begin_a_stop()
        else:
            sure = found
            self._cut(self._ends[-1] - len(self._held) + found)
        shown, self._held = self._held[:sure], self._held[sure:]
        if piece and not self._held:
            self.settled = len(self.tokens)
        return shown

    def flush(self) -> str:
        """The rest of the text, when no more tokens come. An incomplete character is U+FFFD."""
        rest, self._held = self._held + self._stream.flush(), ""
        return rest

    def _could_begin_a_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        lengths = (n for string in self._stop for n in range(1, len(string)) if self._held.endswith(string[:n]))
        return max(lengths, default=0)

    def _cut(self, place: int) -> None:
        """Keep the first `place` characters, with the fewest tokens that make them."""
        self.stopped = True
        whole = bisect_right(self._ends, place)
        end = self._ends[whole - 1] if whole else 0
        num_kept = bisect_left(self._ends, end) + 1 if end else 0
        rest = "".join(self._pieces)[end:place]
        self.tokens = self.tokens[:num_kept] + (self._tokenizer.encode(rest) if rest else [])


class Texts:
    """B texts that are being continued. Arguments are checked now, and nothing is computed before it is asked for."""

    def __init__(self, model, params, prompts, tokenizer, *, context=None, stop=(), **settings):
        check_tokenizer(tokenizer, model)
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"the prompts are {prompts!r}, expected a list of texts")
        ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        self._model, self._params = per_layer(model, params)
        self._prompts = [as_prompts(row, model.vocab_size, context)[0][0] for row in ids]
        self._start = prepare(self._model, self._params, self._prompts, context=context, **settings)
        self._rows = [StoppedText(tokenizer, strings) for strings in stop_strings(stop, len(prompts))]
        self._can_stop = any(stop_strings(stop, len(prompts)))
        self._context = context
        self._progress = self._marked = None
        self._marked_at = np.zeros(len(prompts), int)  # tokens that the marked context has read
        self._intact, self.finished = True, False

    @property
    def tokens(self) -> list[list[int]]:
        return [list(row.tokens) for row in self._rows]

    @property
    def context(self) -> Context:
        """What has read the prompts and exactly `tokens`; also after an interruption, which makes it read again."""
        if self._intact:
            return copy(self._begun().context)
        texts = [
            np.append(prompt, row.tokens).astype(int) for prompt, row in zip(self._prompts, self._rows, strict=True)
        ]
        return read(self._model, self._params, texts, self._context)

    def advance(self, count: int = DISPATCH) -> list[str]:
        """What at most `count` further tokens, up to `DISPATCH`, add to each text for sure."""
        progress = self._begun()
        self._intact, self.finished = False, True
        running_B = progress.left_B > 0
        if self._can_stop:
            self._mark(progress.context)
        new, progress = advance(self._model, self._params, progress, count)
        pieces = []
        for row, tokens, running, left in zip(self._rows, new, running_B, progress.left_B, strict=True):
            piece = ""
            for token in tokens:
                piece += row.push(token)
                if row.stopped:
                    break
            pieces.append(piece if row.stopped or left or not running else piece + row.flush())
        stopped_B = running_B & np.array([row.stopped for row in self._rows])
        if stopped_B.any():
            progress = self._taken_back(progress, stopped_B)
        self._progress, self.finished = progress, not progress.left_B.any()
        self._intact = True
        return pieces

    def _begun(self):
        if self._progress is None:
            self._progress = self._start()
        return self._progress

    def _mark(self, context: Context) -> None:
        """Remember the rows of which no stop string can take back a token."""
        now_B = np.array([row.settled == len(row.tokens) for row in self._rows])
        marked = mark(self._model, context)
        self._marked = marked if self._marked is None else go_back(marked, self._marked, ~now_B)
        self._marked_at = np.where(now_B, [len(row.tokens) for row in self._rows], self._marked_at)

    def _taken_back(self, progress, stopped_B):
        """Rows where a stop string was found have read their text, and have ended."""
        again = [
            np.asarray(row.tokens[at:] if stopped else [], np.int32)
            for row, at, stopped in zip(self._rows, self._marked_at, stopped_B, strict=True)
        ]
        context = go_back(progress.context, self._marked, stopped_B)
        room = max(map(len, again))
        context = read_on(self._model, self._params, with_room(self._model, context, room, room), again)
        return replace(progress, context=context, left_B=np.where(stopped_B, 0, progress.left_B))


class Stream:
    """A text that is being continued: an iterator of pieces, of which none ends within a UTF-8 character.

    Stop reading at any time: nothing is computed ahead, and what is here stays valid.

    Attributes:
        text: the pieces that were yielded.
        tokens: `decode(tokens)` begins with `text`, and equals it when the stream is at its end. What lacks before is
            held back: the beginning of a character, or what may be that of a stop string.
        context: has read the prompt and exactly `tokens`. A copy.
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
    """The text of `generate`, in pieces as tokens come.

    Args:
        prompt_text: empty: what comes after the context, or the beginning of a document.
        stop: strings of which the first found ends the text; neither it nor what follows is part of the result.
        settings: those of `generate`.
    """
    return Stream(Texts(model, params, [prompt_text], tokenizer, **settings))


def generate_texts(model, params, prompts: Sequence[str], tokenizer, **settings) -> Result:
    """Texts that continue the prompts, their tokens, and the context that has read prompts and tokens.

    Args:
        prompts: texts, or lists of ids.
        stop: strings for all texts, or a sequence of strings for each; see `stream`.
        settings: those of `generate`; max_new_tokens, seed and start may be a number for each row.
    """
    texts = Texts(model, params, prompts, tokenizer, **settings)
    pieces = [[] for _ in prompts]
    while not texts.finished:
        for row, piece in zip(pieces, texts.advance(), strict=True):
            row.append(piece)
    return Result(["".join(row) for row in pieces], texts.tokens, texts.context)


def stop_strings(stop, B: int) -> list[tuple[str, ...]]:
    """The stop strings of each row, from those for all rows or one sequence for each."""
    as_strings = lambda given: (given,) if isinstance(given, str) else tuple(given) if np.iterable(given) else given
    given = as_strings(stop)
    shared = not np.iterable(given) or all(isinstance(string, str) for string in given)
    rows = [given] * B if shared else [as_strings(row) for row in given]
    good = all(np.iterable(row) and all(isinstance(string, str) and string for string in row) for row in rows)
    if len(rows) != B or not good:
        raise ValueError(f"stop is {stop!r}, expected strings, not empty, for all texts or for each of {B}")
    return rows


def check_tokenizer(tokenizer, model) -> None:
    """Bytes decode nothing but bytes; other tokenizers skip ids that a padded vocabulary has beyond theirs."""
    V, vocab_size = model.vocab_size, tokenizer.vocab_size
    if vocab_size > V or (tokenizer.name == "bytes" and vocab_size < V):
        raise ValueError(
            f"tokenizer {tokenizer.name} has {vocab_size} tokens, the model {V}: expected the model's own"
        )
