"""Progress of a run, and an account of its wall time over all its starts."""

import contextlib
import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines where there is no terminal
LOST = ("startup", "compile", "evaluate", "diagnose", "save", "redone", "down")


class Clock:
    """Account for the wall time of a run since its first start, in seconds.

    `train` is the time of the steps that count. The rest is `lost`:

        startup     corpus, model and checkpoint, up to the first step
        compile     the first step of each start, which compiles
        evaluate, diagnose, save
        redone      steps that a later start had to repeat from a checkpoint
        down        between starts, and time that a killed start had not logged

    Args:
        rows: of `metrics.jsonl`, before it is cut back to `step`.
        step: where this start resumes.
        began: `time.time()` when this start began.
    """

    def __init__(self, rows, step, began):
        logged = [row for row in rows if "train_seconds" in row]
        reached = logged[-1]["train_seconds"] if logged else 0.0
        self.train = next((row["train_seconds"] for row in reversed(logged) if row["step"] <= step), 0.0)
        self.lost = dict.fromkeys(LOST, 0.0) | (logged[-1].get("lost_seconds", {}) if logged else {})
        self.lost["redone"] += reached - self.train
        self.began = next((row["began"] for row in rows if "began" in row), round(began - reached, 3))
        self.starts = 1 + sum("began" in row for row in rows)
        self.last = began

    def lap(self, part) -> float:
        """Count the time since the last lap as spent on `part`."""
        now = time.time()
        seconds, self.last = now - self.last, now
        if part == "train":
            self.train += seconds
        else:
            self.lost[part] += seconds
        return seconds

    def row(self) -> dict:
        """`train_seconds`, `wall_seconds`, their ratio `goodput`, and `lost_seconds` by cause."""
        wall = self.last - self.began
        self.lost["down"] = max(0.0, wall - self.train - sum(self.lost[part] for part in LOST if part != "down"))
        return {
            "train_seconds": round(self.train, 3),
            "wall_seconds": round(wall, 3),
            "goodput": round(self.train / wall, 4) if wall else 0.0,
            "lost_seconds": {part: round(seconds, 3) for part, seconds in self.lost.items()},
        }


@contextlib.contextmanager
def shown(start, steps):
    """Yield `show(done, text)`: a bar with rate and time left on a terminal, else a line every `LINE_SECONDS`."""
    if sys.stderr.isatty():
        with tqdm(total=steps, initial=start, unit="step") as bar:

            def show(done, text):
                bar.set_postfix_str(text, refresh=False)
                bar.update(done - bar.n)

            yield show
        return
    first, began = None, 0.0  # the rate leaves out the first step, which compiles
    printed = time.monotonic()

    def show(done, text):
        nonlocal first, began, printed
        now = time.monotonic()
        first, began = (done, now) if first is None else (first, began)
        if now - printed >= LINE_SECONDS or done == steps:
            printed = now
            line = "{n_fmt}/{total_fmt} steps [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
            meter = {"initial": first, "unit": "step", "postfix": text, "bar_format": line}
            print(tqdm.format_meter(done, steps, now - began, **meter), file=sys.stderr, flush=True)

    yield show
