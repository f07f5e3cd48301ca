"""ListOps of the Long Range Arena: nested lists under MIN, MAX, MED and SM, and rules that see little of them.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]  ->  5

The public recipe (google-research/long-range-arena, lra_benchmarks/data/listops.py): above the greatest depth an
expression is nested with probability 1/4, otherwise a digit. Operators and digits are uniform; the number of arguments
is uniform from 2 to the maximum. Expressions with a length strictly between two limits are kept, without duplicates.
MED is the median, rounded down if it falls between two digits; SM is the sum modulo 10. An operator with its bracket
is one token, and so is the closing bracket; there are no parentheses (S4's loader strips those of the public files).
"""

import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

OPERATORS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
FUNCTIONS = tuple(OPERATORS.values())
TYPICAL = (0, 9, 4, 4)  # value that a rule assumes for an expression it does not evaluate: MIN, MAX, MED, SM
OPERATOR, END, VOCAB_SIZE = 10, 14, 15  # tokens: the digits, the operators, the closing bracket
NESTED = 0.25
PIECE = 500  # expressions per seed, so that the result does not depend on the number of processes


class Recipe(NamedTuple):
    """Lengths in tokens, both limits excluded. The defaults are the public files'."""

    above: int = 500
    below: int = 2000
    max_depth: int = 10
    max_args: int = 10


PUBLIC = Recipe()


class Examples(NamedTuple):
    """Token sequences of any length, and the class of each. With `num_documents` 2, two sequences form an example."""

    tokens: Sequence[np.ndarray]  # unsigned integers
    labels: np.ndarray  # [examples]
    num_documents: int = 1

    def part(self, start: int, stop: int) -> "Examples":
        n = self.num_documents
        return Examples(self.tokens[n * start : n * stop], self.labels[start:stop], n)


class _TooLongError(Exception):
    pass


def generate(number: int, recipe: Recipe = PUBLIC, seed: int = 0, processes: int = 1) -> Examples:
    """Return the first `number` distinct expressions of a seed."""
    found, piece = {}, 0
    with tqdm(total=number, desc="expressions", disable=None, leave=False) as bar:
        while len(found) < number:
            missing = -(-(number - len(found)) // PIECE)
            jobs = [(PIECE, recipe, f"{seed} {piece + i}") for i in range(missing)]
            for made in _mapped(_piece, jobs, processes):
                found.update(made)
                bar.update(min(number, len(found)) - bar.n)
            piece += missing
    chosen = list(found.items())[:number]
    tokens = [np.frombuffer(tokens, np.uint8) for tokens, _ in chosen]
    return Examples(tokens, np.array([value for _, value in chosen], np.int32))


def _mapped(function, jobs, processes):
    if processes == 1:
        yield from map(function, jobs)
        return
    # not by fork, because this process has JAX's threads
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def _piece(job) -> dict[bytes, int]:
    number, recipe, seed = job
    rng, made = random.Random(seed), {}
    while len(made) < number:
        tokens = []
        try:
            value = _expression(rng, recipe, 1, tokens)
        except _TooLongError:
            continue
        if len(tokens) > recipe.above:
            made[bytes(tokens)] = value
    return made


def _expression(rng, recipe, depth, tokens) -> int:
    """Append an expression and return its value."""
    if len(tokens) >= recipe.below:
        raise _TooLongError
    if depth == recipe.max_depth or rng.random() >= NESTED:
        digit = int(rng.random() * 10)
        tokens.append(digit)
        return digit
    operator = int(rng.random() * len(FUNCTIONS))
    tokens.append(OPERATOR + operator)
    values = [_expression(rng, recipe, depth + 1, tokens) for _ in range(rng.randint(2, recipe.max_args))]
    tokens.append(END)
    if len(tokens) >= recipe.below:
        raise _TooLongError
    return FUNCTIONS[operator](values)


def evaluate(tokens: Sequence[int], levels: float = np.inf) -> int:
    """Return the value of an expression, evaluating its operators down to `levels` levels; 1 is the root alone.

    Deeper expressions count as `TYPICAL` of their operator. With 0 levels, only the root's operator counts.
    """
    stack = []  # (operator, values so far) of open lists
    for token in map(int, tokens):
        if token < OPERATOR:
            value = token
        elif token < END:
            stack.append((token - OPERATOR, []))
            continue
        else:
            operator, values = stack.pop()
            value = FUNCTIONS[operator](values) if len(stack) < levels else TYPICAL[operator]
        if not stack:
            return value
        stack[-1][1].append(value)
    raise ValueError(f"{len(stack)} unclosed lists, expected one expression")


def rules(known: Examples, asked: Examples, levels: Sequence[int] = (1, 2, 3)) -> dict[str, float]:
    """Return the share of `asked` that rules without learning get right; most frequent answers are from `known`."""
    answer = lambda labels: int(np.bincount(labels, minlength=10).argmax())
    root = lambda examples: np.array([tokens[0] for tokens in examples.tokens])
    by_operator = {operator: answer(known.labels[root(known) == operator]) for operator in range(OPERATOR, END)}
    guesses = {
        "most frequent answer": np.full(len(asked.labels), answer(known.labels)),
        "root operator alone": np.array([by_operator[operator] for operator in root(asked)]),
    }
    for depth in levels:
        name = "root evaluated" if depth == 1 else f"{depth} levels evaluated"
        guesses[name] = np.array([evaluate(tokens, depth) for tokens in asked.tokens])
    return {name: float((guess == asked.labels).mean()) for name, guess in guesses.items()}
