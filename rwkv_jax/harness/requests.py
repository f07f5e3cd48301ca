"""Log-likelihoods of continuations given contexts, for multiple-choice and perplexity tasks.

A context is read once however many continuations it has, and so are prefixes that contexts share. Continuations are
scored from copies of the state, in segments: a text of any length takes the memory of a short one.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from rwkv_jax import evaluate
from rwkv_jax.generate.context import begin, rows
from rwkv_jax.harness.prefixes import read_many
from rwkv_jax.models import per_layer

WINDOW = 16  # batches of contexts whose states are held at one time


class Scored(NamedTuple):
    log_p: float  # of all tokens of the continuation, in nats, at most 0
    is_greedy: bool  # whether each was the likeliest at its position


def score(model, params, pairs: Sequence[tuple], batch_size: int = 8, progress: bool = True) -> list[Scored]:
    """Return log p of each continuation given its context, in order.

    Args:
        pairs: (ids of the context, ids of the continuation), each at least one token in [0, V).
        batch_size: texts read at one time. A result does not depend on the others of its batch.
    """
    for _, continuation in pairs:
        if len(continuation) == 0:
            raise ValueError("nothing to score in an empty continuation, expected at least one token")
    model, params = per_layer(model, params)
    of_context = defaultdict(list)
    for i, (context, _) in enumerate(pairs):
        of_context[tuple(map(int, context))].append(i)
    scored = {}
    with tqdm(desc="scored", total=len(pairs), unit="text", disable=None if progress else True) as bar:
        for contexts in batches(sorted(of_context), WINDOW * batch_size):
            after = read_many(model, params, contexts, batch_size)
            asked = [(row, i) for row, context in enumerate(contexts) for i in of_context[context]]
            asked.sort(key=lambda at: len(pairs[at[1]][1]))
            for batch in batches(asked, batch_size):
                filled = batch + batch[-1:] * (batch_size - len(batch))
                texts = [pairs[i][1] for _, i in filled]
                forks = begin(model, rows(after, [row for row, _ in filled]), batch_size, max(map(len, texts)))
                results = evaluate.continuations(model, params, texts, forks.logits_BV, forks.state)
                for (_, i), (log_p_N, likeliest_N) in zip(batch, results, strict=False):
                    scored[i] = Scored(float(log_p_N.sum(dtype=float)), bool(likeliest_N.all()))
                bar.update(len(batch))
    return [scored[i] for i in range(len(pairs))]


def batches(values: list, size: int) -> Iterator[list]:
    """Return an iterator over lists of `size` values, the last perhaps shorter."""
    return (values[first : first + size] for first in range(0, len(values), size))
