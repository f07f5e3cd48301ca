"""Loss against compute: the Pareto frontier, a straight line in log-log, a saturating law, and their extrapolation
errors.

    line         L = k C^-a             the line of Fig. 4
    saturating   L = E + k C^-a, E >= 0 (Chinchilla's form along its own frontier)

The line is a least-squares fit of log L; the saturating law one of relative residuals, which agree to first order.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from experiments import statistics


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

    None if the frontier has fewer than 4 runs up to `until`, one more than the saturating law has parameters, or none
    beyond.
    """
    compute, loss = np.asarray(compute, float), np.asarray(loss, float)
    frontier = pareto(compute, loss)
    c, y = compute[frontier], loss[frontier]
    fitted, beyond = c <= until, c > until
    if fitted.sum() < 4 or not beyond.any():
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


def bootstrap(compute, loss, until: float, samples: int = 500) -> dict:
    """Return 95 % intervals of the results of `judged`, from runs drawn with replacement.

    There are none where `judged` is None, or fits only 4 runs: every draw that it can fit has the same four.

    Runs are resampled, not points of the frontier. Those are order statistics, and resampling them would hide that
    another run might have been on the frontier. A run that is drawn twice counts once, which makes the spread of the
    draws about 0.8 of what it would be with weights. Draws for which `judged` is None are left out.
    """
    its = judged(compute, loss, until)
    if its is None or its["points"][0] < 5:
        return {"samples": 0}
    compute, loss, rng = np.asarray(compute, float), np.asarray(loss, float), np.random.default_rng(0)
    chosen = (np.unique(rng.integers(len(loss), size=len(loss))) for _ in range(samples))
    found = [its for i in chosen if (its := judged(compute[i], loss[i], until))]
    drawn = {
        "line exponent": [its["line"]["exponent"] for its in found],
        "floor": [its["saturating"]["floor"] for its in found],
        "line minus saturating, rms beyond": [
            its["line"]["beyond"]["rms"] - its["saturating"]["beyond"]["rms"] for its in found
        ],
    }
    intervals = {name: np.quantile(values, (0.025, 0.975)).tolist() for name, values in drawn.items()}
    return {"samples": len(found)} | intervals


def ratio(these, those, bytes_D, spread: statistics.Spread | None = None) -> dict | None:
    """Return the compute that one model needs for the lowest loss that both reach, over what the other needs.

    That loss is the end of one frontier, and a point between two runs of the other, interpolated in log-log. Returns
    None if the frontiers have no loss in common. The 95 % interval is a bootstrap over documents, which are the same
    for both models, or, if wider, over seeds: from the losses of one model moved against the other's by either end of
    the interval of a difference of 0. `low` and `high` are None where one has no loss in common, or none is known.

    Args:
        these, those: (compute [N], nats [N, D] of each document) of the runs of each model, one seed a run.
        bytes_D: bytes of each document.
        spread: of the difference of two models over seeds, in nats a byte; None: the interval is over documents.
    """

    def at_lowest(drawn, moved=0.0):
        found = []
        for (compute_N, nats_ND), by in ((these, moved), (those, 0.0)):
            loss_N = np.sum(np.asarray(nats_ND)[:, drawn], axis=1) / np.sum(np.asarray(bytes_D)[drawn]) + by
            frontier = pareto(compute_N, loss_N)[::-1]  # by loss
            found.append(np.log([loss_N[frontier], np.asarray(compute_N, float)[frontier]]))
        lowest = max(loss[0] for loss, _ in found)
        a, b = (np.interp(lowest, loss, compute, right=np.nan) for loss, compute in found)
        return lowest, a - b

    documents = len(bytes_D)
    lowest, log_ratio = at_lowest(np.arange(documents))
    if np.isnan(log_ratio):
        return None
    low, high = statistics.bootstrap(lambda drawn: at_lowest(drawn)[1], documents)
    if spread:
        _, *ends = statistics.t_interval([0.0], spread)
        over_seeds = [at_lowest(np.arange(documents), end)[1] for end in ends]
        low, high = (np.nan, np.nan) if np.isnan(over_seeds).any() else statistics.wider((low, high), over_seeds)
    of_logs = {"loss_nats": lowest, "ratio": log_ratio, "low": low, "high": high}
    return {name: None if np.isnan(log) else float(np.exp(log)) for name, log in of_logs.items()}


def told(its: dict) -> str:
    """Format the result of `ratio`: "1.67 [1.50, 1.80]"; without an interval that is None."""
    interval = "" if its["low"] is None else f" [{its['low']:.2f}, {its['high']:.2f}]"
    return f"{its['ratio']:.2f}{interval}"


def chinchilla(compute):
    """Return the loss of the compute-optimal model at a compute (Hoffmann et al. 2022, approach 3).

    1.69 + 406.4 N^-0.34 + 410.7 D^-0.28, C = 6 N D.
    """
    alpha, beta, a, b = 0.34, 0.28, 406.4, 410.7
    ratio, tokens_by_parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)), np.asarray(compute, float) / 6
    parameters = ratio * tokens_by_parameters ** (beta / (alpha + beta))
    return 1.69 + a * parameters**-alpha + b * (tokens_by_parameters / parameters) ** -beta
