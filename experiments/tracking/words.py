"""Words over a finite group: tokens are elements, and the label at each position is the product so far.

    tokens x1 x2 x3 ...        labels x1, x1 x2, x1 x2 x3, ...

S3 is the smallest group that does not commute; Z6, of the same size, does. A5 is the smallest that is not solvable:
threshold circuits of constant depth evaluate its words only if TC0 = NC1 (Barrington 1989).
"""

import itertools
from functools import cache

import numpy as np

GENERATORS = {"A5": ((1, 2, 3, 4, 0), (1, 2, 0, 3, 4))}  # letters of the group's words; other groups use all elements


def permutations(group: str) -> np.ndarray:
    """Return [G, points]: the elements of a group as permutations, the identity first."""
    if group == "S3":
        return np.array(list(itertools.permutations(range(3))))
    if group == "Z6":
        return (np.arange(6)[:, None] + np.arange(6)) % 6
    if group == "A5":
        every = itertools.permutations(range(5))
        return np.array([p for p in every if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0])
    raise ValueError(f"unknown group {group!r}, expected one of S3, Z6, A5")


@cache
def product_table(group: str) -> np.ndarray:
    """Return [G, G]: entry (g, h) is the number of the product g h, first g and then h."""
    elements = permutations(group)
    number = {tuple(p): i for i, p in enumerate(elements.tolist())}
    return np.array([[number[tuple(h[g].tolist())] for h in elements] for g in elements], np.int32)


@cache
def letters(group: str) -> np.ndarray:
    """Return the numbers of the elements that words are made of."""
    elements = permutations(group).tolist()
    return np.array([elements.index(list(p)) for p in GENERATORS.get(group, elements)], np.int32)


def words(rng: np.random.Generator, batch_size: int, seq_len: int, group: str) -> dict:
    """Return {"tokens" [B, T + 1], "targets" [B, T], "mask" [B, T]}: uniform letters; every label counts."""
    table = product_table(group)
    tokens_BT = rng.choice(letters(group), (batch_size, seq_len + 1))
    targets_BT = tokens_BT[:, :-1].copy()
    for t in range(1, seq_len):
        targets_BT[:, t] = table[targets_BT[:, t - 1], tokens_BT[:, t]]
    return {"tokens": tokens_BT, "targets": targets_BT, "mask": np.ones((batch_size, seq_len), bool)}
