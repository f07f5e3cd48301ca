"""Facts to trace, of a generated world or of a file, as prompts of one length that a model completes."""

from typing import NamedTuple

import jax
import numpy as np

from rwkv_jax.data import SEPARATOR
from rwkv_jax.files import read_json, user_path


class Prompt(NamedTuple):
    """Tokens up to the answer; those before the first valid one are padding."""

    tokens_T: np.ndarray  # int32
    valid_T: np.ndarray
    subject_T: np.ndarray
    answer: np.ndarray  # int32, the token that follows


RELATIONS, TEMPLATES = 2, 3
LENGTHS = (2, 3)  # tokens of a subject
# Numbers of words before and after the subject, by template. Only the words after it express the relation.
BEFORE, AFTER = (0, 1, 2), (3, 3, 4)


class World(NamedTuple):
    """Generated facts: every subject has one object in each relation, expressed in three ways each."""

    subjects: list[tuple[int, ...]]
    objects_SR: np.ndarray  # [subjects, relations] tokens
    before: list[list[int]]  # by template
    after: list[list[list[int]]]  # by relation and template


def world(subjects: int, vocab_size: int, seed: int = 0) -> World:
    """Return a world. Half of the vocabulary are names.

    Subjects share their tokens, so that no single token identifies a subject.
    """
    rng = np.random.default_rng(seed)
    ids = iter(range(1, vocab_size))
    take = lambda n: [next(ids) for _ in range(n)]
    before = [take(n) for n in BEFORE]
    after = [[take(n) for n in AFTER] for _ in range(RELATIONS)]
    names = take(vocab_size // 2)
    objects = np.array(list(ids))
    found = {}
    while len(found) < subjects:
        found[tuple(rng.choice(names, rng.choice(LENGTHS)).tolist())] = None
    return World(list(found), rng.choice(objects, (subjects, RELATIONS)), before, after)


# tokens of the longest prompt, including the separator
LENGTH = 1 + max(b + a for b, a in zip(BEFORE, AFTER, strict=True)) + max(LENGTHS)


def prompt(world: World, subject: int, relation: int, template: int) -> Prompt:
    before, after = world.before[template], world.after[relation][template]
    return padded(before, world.subjects[subject], after, world.objects_SR[subject, relation], LENGTH)


def padded(before, subject, after, answer: int, num_tokens: int) -> Prompt:
    """Return a prompt of `num_tokens` tokens: padding, the separator, then the given parts."""
    tokens = [SEPARATOR, *before, *subject, *after]
    missing = num_tokens - len(tokens)
    at = missing + 1 + len(before)
    subject_T = np.zeros(num_tokens, bool)
    subject_T[at : at + len(subject)] = True
    tokens_T = np.array([SEPARATOR] * missing + tokens, np.int32)
    return Prompt(tokens_T, np.arange(num_tokens) >= missing, subject_T, np.int32(answer))


def stacked(prompts: list[Prompt]) -> Prompt:
    """Return the prompts as one, leaves [prompts, ...]."""
    return jax.tree.map(lambda *x: np.stack(x), *prompts)


def everything(world: World) -> Prompt:
    """Return all prompts of a world, subject by subject."""
    numbers = np.ndindex(len(world.subjects), RELATIONS, TEMPLATES)
    return stacked([prompt(world, *number) for number in numbers])


def from_file(path: str, tokenizer) -> Prompt:
    """Return the prompts of a JSON list of {"subject", "prompt", "attribute"}, the format of ROME's known_1000.json.

    The answer is the first token of the attribute after a space.

    Raises:
        OSError, ValueError: the file is missing, or an entry, named by its number, is not a fact.
    """
    try:
        entries = read_json(user_path(path), list)
        texts = [tuple(entry[key] for key in ("prompt", "subject", "attribute")) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a JSON list of subject, prompt and attribute ({error!r})") from None
    if not texts:
        raise ValueError(f"{path}: no facts")
    parts = []
    for number, (text, subject, attribute) in enumerate(texts):
        before, found, _ = text.partition(subject)
        before = before.rstrip(" ")  # the space belongs to the next word
        ids = tokenizer.encode(text)
        start, stop = (len(tokenizer.encode(part)) for part in (before, text[: text.find(subject) + len(subject)]))
        if not found or not start < stop <= len(ids) or tokenizer.encode(before) != ids[:start]:
            raise ValueError(f"{path}: fact {number}: {subject!r} is not a sequence of whole tokens in {text!r}")
        parts.append((ids[:start], ids[start:stop], ids[stop:], tokenizer.encode(f" {attribute.strip()}")[0]))
    longest = 1 + max(sum(map(len, part[:3])) for part in parts)
    return stacked([padded(*part, longest) for part in parts])
