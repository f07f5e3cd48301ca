"""Timing of several sides in one run."""

import statistics
import time


def medians(sides, inputs, rounds, pause=0.0):
    """Return the seconds of each side, the median over `rounds` in turn: A B A B, so that a slow moment affects both.

    Args:
        sides: functions of one input by name, finished when they return. The first call of each is not timed.
        inputs: at least (rounds + 1) * len(sides) of them, all different: no side may cache anything but its program.
        pause: seconds of rest before each run, for sides with threads of their own: OpenMP threads keep spinning for a
            while after torch has finished, and would take a core from the next side.
    """
    inputs = iter(inputs)
    for run in sides.values():
        run(next(inputs))
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            given = next(inputs)
            time.sleep(pause)
            start = time.perf_counter()
            run(given)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def ratio(what, ours, our_speed, theirs, their_speed, wanted):
    """Return a row of two speeds side by side; `wanted` is the least ratio claimed, None if there is no claim."""
    return {"what": what, "ours": ours, "ours_per_second": our_speed, "theirs": theirs,
            "theirs_per_second": their_speed, "ratio": our_speed / their_speed, "wanted": wanted}  # fmt: skip
