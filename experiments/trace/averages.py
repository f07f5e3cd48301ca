"""Averages of effects: over tokens of a role, then over facts, with intervals."""

import numpy as np

from experiments.statistics import t_interval
from experiments.trace.tracing import KINDS

ROLES = ("before", "first of subject", "middle of subject", "last of subject", "after", "last")


def roles(prompt) -> np.ndarray:
    """Return [roles, T]: a mask of the tokens of each role.

    Each token has one role; a subject of one token is its last.
    """
    T = len(prompt.tokens_T)
    at = np.flatnonzero(prompt.subject_T)
    role_T = np.full(T, ROLES.index("after"))
    role_T[: at[0]] = ROLES.index("before")
    role_T[at] = ROLES.index("middle of subject")
    role_T[at[0]] = ROLES.index("first of subject")
    role_T[at[-1]] = ROLES.index("last of subject")
    role_T[-1] = ROLES.index("last")
    return (role_T == np.arange(len(ROLES))[:, None]) & prompt.valid_T


def by_role(effect_KTL, roles_RT) -> np.ndarray:
    """Return [kinds, roles, L]: means over the tokens of a role, NaN if no token has it."""
    sums_KRL = np.einsum("ktl,rt->krl", effect_KTL, roles_RT)
    count_R1 = roles_RT.sum(1)[:, None]
    return np.where(count_R1 > 0, sums_KRL / np.maximum(count_R1, 1), np.nan)


def other_tokens(prompt, rng) -> np.ndarray:
    """Return [T]: a mask of as many random tokens as the subject has, outside it and the separator.

    There are fewer if the prompt has fewer.
    """
    free = np.flatnonzero(prompt.valid_T & ~prompt.subject_T)[1:]
    chosen = rng.choice(free, min(len(free), int(prompt.subject_T.sum())), replace=False)
    return np.isin(np.arange(len(prompt.tokens_T)), chosen)


def over_facts(values_FN) -> list:
    """Return, for each of N columns, the mean over facts with a value and its t interval; None for fewer than two."""
    known = [values_F[~np.isnan(values_F)] for values_F in np.asarray(values_FN, float).T]
    return [_rounded(t_interval(values_F)) if len(values_F) > 1 else None for values_F in known]


def depth(effect_L) -> float:
    """Return the mean depth of the effects above zero: 0 is the first layer, 1 the last. NaN if there are none."""
    weights_L = np.maximum(effect_L, 0)
    return float(weights_L @ np.linspace(0, 1, len(weights_L)) / weights_L.sum()) if weights_L.any() else np.nan


def deeper(effect_FKRL, seed: int, samples: int = 2000) -> list[float]:
    """Return how much deeper the effect of both lies at the words after the subject than at the subject's last token.

    That is the difference in `depth` of the mean effects, with its 95 % bootstrap interval over facts.
    """
    both_FRL = effect_FKRL[:, list(KINDS).index("both")]
    pair_F2L = both_FRL[:, [ROLES.index("after"), ROLES.index("last of subject")]]
    pair_F2L = pair_F2L[~np.isnan(pair_F2L).any((1, 2))]

    def difference(pairs_F2L):
        after_L, subject_L = pairs_F2L.mean(0)
        return depth(after_L) - depth(subject_L)

    rng, F = np.random.default_rng(seed), len(pair_F2L)
    if F == 0:
        raise ValueError("no fact has words between its subject and its last token")
    drawn = [difference(pair_F2L[rng.integers(F, size=F)]) for _ in range(samples)]
    return _rounded([difference(pair_F2L), *np.nanquantile(drawn, (0.025, 0.975))])


def by_state(effect_FKRL) -> list[float]:
    """Return the effect of both minus that of the residual stream alone, at the words after the subject.

    The mean is over layers; the t interval is over facts.
    """
    after_FKL = effect_FKRL[:, :, ROLES.index("after")]
    both, residual = (list(KINDS).index(kind) for kind in ("both", "residual"))
    difference_F = (after_FKL[:, both] - after_FKL[:, residual]).mean(1)
    return _rounded(t_interval(difference_F[~np.isnan(difference_F)]))


def _rounded(values) -> list[float]:
    return [round(float(x), 5) for x in values]
