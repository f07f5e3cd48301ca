"""Errors of every form of WKV against float64, forward and backward, from one token to 100,000 (`pallas`: to 1,024).

Claim: every form of WKV-4, of WKV-5 and 6 (`ops.wkv6`) and of WKV-7 computes in float32, whatever the input dtype. No
element of y, of a gradient or, but for WKV-4, of the state is further from its equation than its bound, a multiple of
eps of its magnitude. `claims` has the largest measured share of that bound; at most 1 is claimed. bfloat16 inputs add
the rounding of their results and nothing else. `bounds` derives each bound, and names the inputs of WKV-7 that have
none.

    make precision
    python -m experiments.precision.run [--smoke] [--out=DIR]

Inputs, one seed: `vectors` and `matrices`. The judges (NumPy float64, `judge` and `judge_matrices`) get them as
rounded to the dtype of the row.

The error of a channel (in WKV-5, 6 and 7 of a head) is the rms over time of (result - exact), relative to two scales:

- the rms of the exact result. This is the error a user sees, but it says little where terms cancel: WKV-4's gradients
  of w, u and k are exactly 0 at constant tokens (not counted), and near 0 where one token has all of the weight
  (k ~ 10 N(0, 1) at T 17).
- the rms of its magnitude, as the judges define it: the same sum with absolute values in place of the terms, and in
  WKV-7, which removes what it finds, the largest such sum of one step. This is what a relative error in every term
  adds up to. The bound is on this error, for every element.

The tables have the rms over channels and the worst channel. bfloat16 rows are judged after y and the gradients of
bfloat16 inputs are rounded to bfloat16 (those of w, u and states stay float32). "exact, rounded" is the error of that
rounding alone, which does not count against the bound.

Peers of WKV-4's forms, without a bound: "plain scan", Eqs. 23-28 as they stand, differentiated by JAX, its state kept
in the dtype of the inputs (in bfloat16, the effect of writing the recurrence in the dtype of the activations); and
transformers' loop for CPUs by autograd. That loop and "pallas", interpreted here, are skipped beyond T 1,024.

Needs requirements-live.txt (transformers). Cost: 11 minutes on 2 busy cores, most of it compiling. Writes results.json
and figure.png.
"""

import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments import stamp
from experiments.precision import plot, table
from experiments.precision.operators import OPERATORS
from experiments.results import write_json
from rwkv_jax import files
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import user_path

LENGTHS = (1, 17, 1024, 8192, 100_000)
SMOKE_LENGTHS = (1, 17)
DTYPES = ("float32", "bfloat16")


def compare(operator, results, expected):
    """Return the channels' errors by quantity, relative to the exact result (None where 0) and to its magnitude."""
    over_all_but_channels = lambda x: _rms(x.reshape(-1, x.shape[-1]))
    rows = {}
    for name, (value, magnitude) in expected.items():
        error, exactly, size = map(over_all_but_channels, (results[name] - value, value, magnitude))
        counted = exactly > 1e-9 * size  # an exact zero leaves less in float64
        ratio = np.where(counted, error / np.where(counted, exactly, 1), np.nan)
        of_magnitude = error / np.where(size == 0, 1, size)
        rows[name] = {
            "rms": _rms_of_counted(ratio),
            "worst": float(np.nanmax(ratio)) if counted.any() else None,
            "worst_channel": operator.channels[np.nanargmax(ratio)] if counted.any() else None,
            "rms_of_mild": _rms_of_counted(ratio[: operator.decays]),  # the first kind
            "rms_of_magnitude": float(_rms(of_magnitude)),
            "worst_of_magnitude": float(of_magnitude.max()),
        }
    return rows


def _rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=0))


def _rms_of_counted(ratio):
    return float(_rms(ratio[~np.isnan(ratio)])) if not np.isnan(ratio).all() else None


def share_of_bound(operator, form, dtype, given, results, expected):
    """Return the largest error of any element over what the form's bound and rounding to `dtype` allow."""
    shares, underflow = {}, np.finfo(np.float32).tiny / np.finfo(np.float32).eps
    for name, (value, magnitude) in expected.items():
        rounding = float(jnp.finfo(dtype).eps) / 2 if name in operator.rounded and dtype != "float32" else 0.0
        error = abs(results[name] - value) - rounding * abs(value)
        # a factor that underflows is negligible beside the largest product of its channel
        magnitude = magnitude + underflow * (1 + magnitude.max(tuple(range(magnitude.ndim - 1))))
        shares[name] = float((error / ((1 + rounding) * operator.allowed(form, name, *given) * magnitude)).max())
    return {name: max(share, 0.0) for name, share in shares.items()}


def measure(lengths):
    """Return one row per operator, dtype, length and side."""
    return [
        row
        for name, operator in OPERATORS.items()
        for dtype in DTYPES
        for T in lengths
        for row in rows_of(name, operator, dtype, T)
    ]


def rows_of(name, operator, dtype, T):
    """Yield the rows of one operator, dtype and length: its sides, and the error of rounding the exact results."""
    given = operator.inputs(T, dtype)
    expected = operator.exact(*given)
    row = lambda side, results: {
        "operator": name, "dtype": dtype, "T": T, "side": side, "errors": compare(operator, results, expected)
    }  # fmt: skip
    for side, run in operator.sides(T, dtype).items():
        start = time.perf_counter()
        results = {quantity: np.float64(x) for quantity, x in run(*given).items()}
        share = {}
        if side in operator.steps:
            share["share_of_bound"] = share_of_bound(operator, side, dtype, given, results, expected)
        print(f"{name} {dtype} T {T} {side}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        yield row(side, results) | share
    if dtype != "float32":
        to = lambda quantity: dtype if quantity in operator.rounded else "float32"
        rounded = {quantity: np.float64(jnp.asarray(x, to(quantity))) for quantity, (x, _) in expected.items()}
        yield row("exact, rounded", rounded)


def claims(rows):
    """Return (claim, measured, at most) of each operator, form and dtype."""
    found = {}
    for row in rows:
        if "share_of_bound" in row:
            what = f"{row['operator']}, {row['side']}, {row['dtype']}: largest error over its bound"
            found.setdefault(what, []).extend(row["share_of_bound"].values())
    return [(what, float(np.max(shares)), 1.0) for what, shares in found.items()]  # propagates NaN


@reported()
def main(argv=None) -> int:
    parser = Parser(prog="python -m experiments.precision.run", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="short sequences: seconds instead of minutes")
    parser.add_argument(
        "--out", type=user_path, default=Path(__file__).parent, help="folder for results.json and figure.png"
    )
    args = parser.parse_args(argv)
    files.check_output_folder(args.out)
    start = time.perf_counter()
    rows = measure(SMOKE_LENGTHS if args.smoke else LENGTHS)
    results = {
        "bounds": {name: {"bound": x.bound, "steps": x.steps} for name, x in OPERATORS.items()},
        "rows": rows,
        "claims": claims(rows),
        "wall_seconds": time.perf_counter() - start,
        "stamp": stamp.stamp(),
    }
    write_json(args.out / "results.json", results)
    plot.draw(results, args.out / "figure.png")
    print(table.render(results))
    return 0 if all(measured <= most for _, measured, most in results["claims"]) else 1


if __name__ == "__main__":
    end(main())
