"""Error of every form of WKV-4 against float64, forward and backward, from one token to 100,000.

Claim: whatever comes in, every form computes in float32, and no element of y or of the gradients of w, u, k and v is
further from Eq. 16 than eps (2 steps + spread + 16) of its magnitude (`bounds`): `claims` has the largest share of
that bound that was measured, at most 1. bfloat16 inputs add the rounding of their results and nothing else.

    make precision
    python -m experiments.precision.run [--smoke] [--out=DIR]

Inputs: 32 channels, 4 kinds of log weight by 8 decays, from an empty past; values and dy from N(0, 1); one seed. The
judge (NumPy float64, `judge`) gets them as rounded to the dtype of the row. w and u are float32 throughout, as a model
has them.

Error of a channel: rms over time of (result - exact), over the rms of the exact result, and over that of its
magnitude, the same sum with absolute values in place of the terms. The first is what a user sees, and says little
where terms cancel: the gradients of w, u and k are exactly 0 at constant tokens (not counted), and next to 0 where one
token has all of the weight (k ~ 10 N(0, 1) at T 17). The second is what a relative error in every term comes to, and
the bound is on it, for every element. The tables have the rms over channels and the worst channel. bfloat16 rows are
judged after y and the gradients of k and v are rounded to bfloat16 (those of w and u stay float32); "exact, rounded"
is what that rounding costs by itself, and it is not held against the bound.

Beside the forms, without a bound: "plain scan", Eqs. 23-28 as they stand, differentiated by JAX, its state kept in the
dtype of the inputs (so in bfloat16, which is what writing the recurrence in the dtype of the activations does); and
transformers' loop for CPUs by autograd. That loop and "pallas", interpreted here, are left out beyond T 1,024.

Needs requirements-live.txt (transformers). Cost: a minute on 2 cores. Writes results.json and figure.png.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import stamp
from experiments.command import write_json
from experiments.precision import peers, plot, table
from experiments.precision.bounds import STEPS, bound
from experiments.precision.judge import exact
from rwkv_jax import files
from rwkv_jax.command import end, reported
from rwkv_jax.files import user_path
from rwkv_jax.ops import wkv4

LENGTHS = (1, 17, 1024, 8192, 100_000)
SMOKE_LENGTHS = (1, 17)
LONGEST_SLOW = 1024  # tokens: beyond, an interpreted kernel and a loop in Python are left out
DTYPES = ("float32", "bfloat16")
ROUNDED = ("y", "k", "v")  # in the dtype of the inputs; the gradients of w and u are float32

LOG_DECAYS = (-1e-8, -1e-5, -1e-3, -1e-2, -0.1, -0.5, -2.0, -10.0)
constant = lambda x: np.broadcast_to(x[:1], x.shape)
KINDS = {
    "k ~ N(0, 1)": lambda k, v: (k, v),
    "k ~ 10 N(0, 1)": lambda k, v: (10 * k, v),
    "k ~ 1000 + N(0, 1)": lambda k, v: (1000 + k, v),
    "constant tokens": lambda k, v: (constant(k), constant(v)),
}
CHANNELS = [f"{kind}, w = {w:g}" for kind in KINDS for w in LOG_DECAYS]


def inputs(T, dtype):
    """(w_C, u_C float32, k_TC, v_TC, dy_TC of `dtype`)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    pairs = [kind(*normal(2, T, len(LOG_DECAYS))) for kind in KINDS.values()]
    k_TC, v_TC = (np.concatenate(x, axis=1) for x in zip(*pairs, strict=True))
    # -exp of a float32 parameter, as a model has it: transformers is given that parameter, log(-w) in float32
    w_C = -np.exp(np.tile(np.log(-np.array(LOG_DECAYS)), len(KINDS)).astype(np.float32))
    u_C, dy_TC = normal(len(CHANNELS)), normal(*k_TC.shape)
    return w_C, u_C, *(np.asarray(jnp.asarray(x, dtype)) for x in (k_TC, v_TC, dy_TC))


@partial(jax.jit, static_argnums=0)
def gradients(wkv, w_C, u_C, k_TC, v_TC, dy_TC):
    """`wkv`'s y and gradients of sum(dy * y), by name."""
    y_BTC, transposed = jax.vjp(wkv, w_C, u_C, k_TC[None], v_TC[None])
    dw, du, dk_BTC, dv_BTC = transposed(dy_TC[None])
    return {"y": y_BTC[0], "w": dw, "u": du, "k": dk_BTC[0], "v": dv_BTC[0]}


def sides(T, dtype):
    """What is measured at a length: functions of `inputs`, by name."""
    forms = [form for form in STEPS if form != "pallas" or T <= LONGEST_SLOW]
    # one named function each: `gradients` compiles anew for each
    found = {form: partial(gradients, partial(_outputs, form)) for form in forms}
    found["plain scan"] = partial(gradients, peers.plain_scan)
    if T <= LONGEST_SLOW and dtype == "float32":
        found["transformers"] = peers.transformers_gradients
    return found


def _outputs(form, w_C, u_C, k_BTC, v_BTC):
    return wkv4(w_C, u_C, k_BTC, v_BTC, impl=form)[0]


def compare(results, expected):
    """Errors of the channels by quantity, relative to the exact result (None where that is 0) and to its magnitude."""
    rows = {}
    for name, (value, magnitude) in expected.items():
        error, exactly, size = (_rms(np.atleast_2d(x)) for x in (results[name] - value, value, magnitude))
        counted = exactly > 1e-9 * size  # what float64 leaves of a zero is less
        ratio = np.where(counted, error / np.where(counted, exactly, 1), np.nan)
        of_magnitude = error / np.where(size == 0, 1, size)
        rows[name] = {
            "rms": _rms_of_counted(ratio),
            "worst": float(np.nanmax(ratio)) if counted.any() else None,
            "worst_channel": CHANNELS[np.nanargmax(ratio)] if counted.any() else None,
            "rms_of_mild": _rms_of_counted(ratio[: len(LOG_DECAYS)]),  # k ~ N(0, 1), the first kind
            "rms_of_magnitude": float(_rms(of_magnitude)),
            "worst_of_magnitude": float(of_magnitude.max()),
        }
    return rows


def _rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=0))


def _rms_of_counted(ratio):
    return float(_rms(ratio[~np.isnan(ratio)])) if not np.isnan(ratio).all() else None


def share_of_bound(form, dtype, given, results, expected):
    """Largest error of any element over what the form's bound and the rounding of results to `dtype` allow."""
    _, u_C, k_TC, _, _ = given
    k_TC = np.asarray(k_TC, np.float64)
    shares, underflow = {}, np.finfo(np.float32).tiny / np.finfo(np.float32).eps
    for name, (value, magnitude) in expected.items():
        rounding = float(jnp.finfo(dtype).eps) / 2 if name in ROUNDED and dtype != "float32" else 0.0
        allowed = bound(form, len(k_TC), np.ptp(k_TC, axis=0) + abs(u_C), summed=name in "wu")
        error = abs(results[name] - value) - rounding * abs(value)
        shares[name] = float((error / ((1 + rounding) * allowed * (magnitude + underflow))).max())
    return {name: max(share, 0.0) for name, share in shares.items()}


def measure(lengths):
    """One row for each dtype, length and side."""
    rows = []
    for dtype in DTYPES:
        for T in lengths:
            given = inputs(T, dtype)
            expected = exact(*given)
            row = lambda side, results, T=T, dtype=dtype, expected=expected: {
                "dtype": dtype, "T": T, "side": side, "errors": compare(results, expected)
            }  # fmt: skip
            for side, run in sides(T, dtype).items():
                start = time.perf_counter()
                results = {name: np.float64(x) for name, x in run(*given).items()}
                rows.append(row(side, results))
                if side in STEPS:
                    rows[-1]["share_of_bound"] = share_of_bound(side, dtype, given, results, expected)
                print(f"{dtype} T {T} {side}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
            if dtype != "float32":
                to = lambda name, dtype=dtype: dtype if name in ROUNDED else "float32"
                rounded = {name: np.float64(jnp.asarray(x, to(name))) for name, (x, _) in expected.items()}
                rows.append(row("exact, rounded", rounded))
    return rows


def claims(rows):
    """(what, measured, at most) of each form and dtype."""
    found = {}
    for row in rows:
        if "share_of_bound" in row:
            found.setdefault((row["side"], row["dtype"]), []).append(max(row["share_of_bound"].values()))
    return [(f"{form}, {dtype}: largest error over its bound", max(x), 1.0) for (form, dtype), x in found.items()]


@reported()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.precision.run", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="short sequences: seconds instead of minutes")
    parser.add_argument(
        "--out", type=user_path, default=Path(__file__).parent, help="folder of results.json and figure.png"
    )
    args = parser.parse_args(argv)
    files.check_output_folder(args.out)
    start = time.perf_counter()
    rows = measure(SMOKE_LENGTHS if args.smoke else LENGTHS)
    results = {
        "steps": {form: text for form, (text, _) in STEPS.items()},
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
