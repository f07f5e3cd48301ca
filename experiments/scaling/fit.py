"""Loss against compute: the Pareto frontier, a straight line in log-log, a saturating law, and their extrapolation
errors.

    line         L = k C^-a             the line of Fig. 4
    saturating   L = E + k C^-a, E >= 0 (Chinchilla's form along its own frontier)

The line is a least-squares fit of log L; the saturating law one of relative residuals, which agree to first order.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar


class Law(NamedTuple):
    """The law L(C) = floor + k (C / unit)^-exponent."""

    floor: float
    k: float
    exponent: float
    unit: float  # geometric mean of the fitted compute: k is then a loss

    def __call__(self, compute):
        return self.floor + self.k * (np.asarray(compute, float) / self.unit) ** -self.exponent


def pareto(compute, loss) -> np.ndarray:
    """Return the indices, by compute, of runs that no other run beats with as much compute or less."""
    order = np.lexsort((loss, compute))
    best = np.minimum.accumulate(np.asarray(loss, float)[order])
    first = np.concatenate([[True], best[1:] < best[:-1]])
    return order[first]


def line(compute, loss) -> Law:
    unit = np.exp(np.mean(np.log(compute)))
    slope, at_unit = np.polyfit(np.log(np.asarray(compute) / unit), np.log(loss), 1)
    return Law(0.0, float(np.exp(at_unit)), float(-slope), float(unit))


def saturating(compute, loss) -> Law:
    """Return the saturating law that fits best.

    For a given exponent, floor and k are a linear problem. The exponent is searched on a grid, then around its best.
    """
    unit, loss = float(np.exp(np.mean(np.log(compute)))), np.asarray(loss, float)
    x = np.asarray(compute, float) / unit

    def best(exponent):
        powers = x**-exponent / loss
        floors = 1 / loss
        (floor, k), *_ = np.linalg.lstsq(np.stack([floors, powers], axis=1), np.ones_like(loss), rcond=None)
        if floor < 0 or k < 0:
            floor, k = 0.0, powers.sum() / (powers @ powers)
        return np.square(floor * floors + k * powers - 1).sum(), floor, k

    grid = np.geomspace(1e-3, 3, 60)
    i = int(np.argmin([best(exponent)[0] for exponent in grid]))
    bounds = (grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)])
    exponent = minimize_scalar(lambda a: best(a)[0], bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    _, floor, k = best(exponent)
    return Law(float(floor), float(k), float(exponent), unit)


LAWS = {"line": line, "saturating": saturating}


def errors(law: Law, compute, loss) -> dict:
    """Return relative errors of predictions, and r^2 of log loss by both definitions.

    The paper does not say which definition it uses.
    """
    relative = law(compute) / np.asarray(loss) - 1
    predicted, seen = np.log(law(compute)), np.log(loss)
    spread = np.square(seen - seen.mean()).sum()
    return {
        "max": float(np.abs(relative).max()),
        "rms": float(np.sqrt(np.square(relative).mean())),
        "r2_correlation": float(np.corrcoef(predicted, seen)[0, 1] ** 2) if len(seen) > 1 else None,
        "r2_explained": float(1 - np.square(predicted - seen).sum() / spread) if spread else None,
    }


def judged(compute, loss, until: float) -> dict | None:
    """Return both laws, fitted to the frontier's runs of at most `until` FLOP, and their errors there and beyond.

    None if the frontier has fewer than 3 runs up to `until`, or none beyond.
    """
    compute, loss = np.asarray(compute, float), np.asarray(loss, float)
    frontier = pareto(compute, loss)
    c, y = compute[frontier], loss[frontier]
    fitted, beyond = c <= until, c > until
    if fitted.sum() < 3 or not beyond.any():
        return None
    found = {"points": [int(fitted.sum()), int(beyond.sum())]}
    for name, fit in LAWS.items():
        law = fit(c[fitted], y[fitted])
        found[name] = {
            **law._asdict(),
            "fit": errors(law, c[fitted], y[fitted]),
            "beyond": errors(law, c[beyond], y[beyond]),
        }
    return found


def bootstrap(compute, loss, until: float, samples: int = 1000, seed: int = 0) -> dict:
    """Return 95 % intervals of the results of `judged`, from runs drawn with replacement.

    Runs are resampled, not points of the frontier. Those are order statistics, and resampling them would hide that
    another run might have been on the frontier.
    """
    compute, loss, rng = np.asarray(compute, float), np.asarray(loss, float), np.random.default_rng(seed)
    chosen = (np.unique(rng.integers(len(loss), size=len(loss))) for _ in range(samples))
    found = [its for i in chosen if (its := judged(compute[i], loss[i], until))]
    if not found:
        return {"samples": 0}
    drawn = {
        "line exponent": [its["line"]["exponent"] for its in found],
        "floor": [its["saturating"]["floor"] for its in found],
        "line minus saturating, rms beyond": [
            its["line"]["beyond"]["rms"] - its["saturating"]["beyond"]["rms"] for its in found
        ],
    }
    intervals = {name: np.quantile(values, (0.025, 0.975)).tolist() for name, values in drawn.items()}
    return {"samples": len(found)} | intervals


def ratio(these: dict, those: dict, samples: int = 1000, seed: int = 0) -> dict | None:
    """Return the compute that one model needs for a loss over what another needs; None if they have no loss in common.

    The ratio is a geometric mean over the losses that both frontiers reach; the ratio at the lowest of them is
    returned too. The 95 % interval is a bootstrap over runs, drawn in pairs: it has no variance of seeds, because each
    run has one.

    Args:
        these, those: (compute, loss) of the runs of each model, keyed by what pairs them; unpaired runs are ignored.
    """
    both = sorted(these.keys() & those.keys())
    paired_2N2 = np.array([[its[name] for name in both] for its in (these, those)], float)

    def log_ratio(runs_2N2):
        found = [runs[pareto(*runs.T)].T for runs in runs_2N2]
        lowest, highest = max(y.min() for _, y in found), min(y.max() for _, y in found)
        if lowest >= highest:
            return np.nan, np.nan
        levels = np.geomspace(lowest, highest, 50)
        a, b = (np.interp(np.log(levels), np.log(y[::-1]), np.log(c[::-1])) for c, y in found)
        return (a - b).mean(), (a - b)[0]

    mean, at_lowest = log_ratio(paired_2N2)
    if np.isnan(mean):
        return None
    rng = np.random.default_rng(seed)
    drawn = (np.unique(rng.integers(len(both), size=len(both))) for _ in range(samples))
    found = np.array([log_ratio(paired_2N2[:, i])[0] for i in drawn])
    low, high = np.quantile(found[~np.isnan(found)], (0.025, 0.975))
    return {
        "pairs": len(both),
        "ratio": float(np.exp(mean)),
        "interval": np.exp([low, high]).tolist(),
        "at_lowest_loss": np.exp(at_lowest),
    }


def chinchilla(compute):
    """Return the loss of the compute-optimal model at a compute (Hoffmann et al. 2022, approach 3).

    1.69 + 406.4 N^-0.34 + 410.7 D^-0.28, C = 6 N D.
    """
    alpha, beta, a, b = 0.34, 0.28, 406.4, 410.7
    ratio, tokens_by_parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)), np.asarray(compute, float) / 6
    parameters = ratio * tokens_by_parameters ** (beta / (alpha + beta))
    return 1.69 + a * parameters**-alpha + b * (tokens_by_parameters / parameters) ** -beta
