"""Learning rates of arms and sizes: grids a factor of 2 apart, extended until the best rate is not at an end."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments import stamp
from experiments.results import write_json
from rwkv_jax.files import read_json

COMPARE = Path(__file__).parent / "compare" / "sweep.json"
STAMPED = ("command", "commit", "date", "processor", "devices")
RELEASED = (768, 6e-4)  # width and rate of the smallest released model


def swept(path: Path) -> dict:
    """Return {"ARM LxD": {rate: loss}} of a sweep; {} if there is none."""
    return read_json(path)["runs"] if path.exists() else {}


def bracket(
    path: Path, name: str, centre: float, value_of: Callable[[float], float], better=min, widest=None, **about
) -> None:
    """Sweep rates around the power of 2 times 1e-3 nearest to `centre`, and save the values under `name`.

    Args:
        path: JSON {"runs": {name: {rate: value}}, "made": {name: command, commit, ...}, ...}, written after each run;
            values in it are not recomputed.
        about: what else to keep of this search, such as its steps.
    """
    its = stamp.stamp()
    results = read_json(path) if path.exists() else {"runs": {}}
    runs, nearest = results["runs"].setdefault(name, {}), 1e-3 * 2.0 ** round(np.log2(centre / 1e-3))
    rates = (nearest / 2, nearest, nearest * 2)
    for rate in search(rates, runs, lambda rate: round(value_of(rate), 4), better, widest):
        print(f"{name} lr {rate}: {runs[rate]:.4f}", flush=True)
        results.setdefault("made", {})[name] = about | {key: its[key] for key in STAMPED}
        write_json(path, results)


def search(
    rates: Sequence[float], values: dict, value_of: Callable[[float], float], better=min, widest: int | None = None
) -> Iterator[str]:
    """Fill `values` {rate: value} at `rates`, then by factors of 2 while the best is at an end; yield each new key.

    Args:
        values: values that it holds are not recomputed. Keys are rates in the format "g".
        better: min or max; among equal values the lowest rate is the best.
        widest: maximum number of rates, even if the best is at an end.
    """
    while rates and (widest is None or len(values) < widest):
        for rate in rates:
            if (key := f"{rate:g}") not in values:
                values[key] = value_of(rate)
                yield key
        tried = sorted(map(float, values))
        best = better(tried, key=lambda rate: values[f"{rate:g}"])
        rates = [best / 2] * (best == tried[0]) + [best * 2] * (best == tried[-1])


def lr(path: Path, arm: str, num_layers: int, dim: int) -> float | None:
    """Return the best rate of an arm at a size in compare's sweep, or else in `path`; None if neither has the arm.

    Between the widths of compare's sweep, interpolate linearly in log-log; the line ends at the released rate.
    """
    for sweep in (COMPARE, path):
        if found := best(sweep, f"{arm} {num_layers}x{dim}"):
            return found
    swept_by_compare = (name for name in swept(COMPARE) if name.split(" ")[0] == arm)
    points = [(int(name.split("x")[-1]), best(COMPARE, name)) for name in swept_by_compare]
    if not points:
        return None
    dims, rates = np.log(np.array(sorted([*points, RELEASED]))).T
    return float(np.exp(np.interp(np.log(dim), dims, rates)))


def best(path: Path, name: str, better=min) -> float | None:
    """Return the rate of `name` with the best value in a sweep; None if it was not swept."""
    runs = swept(path).get(name)
    return runs and float(better(runs, key=runs.get))
