"""Detect divergence: losses that are not finite, or that jump."""

import collections
import statistics

WINDOW = 20  # steps whose mean loss a step is compared with


class DivergedError(ArithmeticError):
    """A run has diverged and ends; its checkpoints are kept."""


class Watch:
    """Decides after each step whether the run has diverged.

    Args:
        max_skipped: non-finite steps in a row that are allowed; none of them changes the state.
        max_loss_rise: allowed rise above the mean loss of the last `WINDOW` steps of this start, in nats; 0: any. The
            first `WINDOW` steps may rise by any amount.
        skipped: steps skipped before this start.
    """

    def __init__(self, max_skipped: int, max_loss_rise: float, skipped: int):
        self.max_skipped, self.max_loss_rise = max_skipped, max_loss_rise
        self.skipped, self.in_a_row = skipped, 0
        self.recent = collections.deque(maxlen=WINDOW)

    def problem(self, step: int, loss: float, skipped: int, targets: int) -> str:
        """Return why the run should end after `step`, or "".

        `skipped` counts all skipped steps so far, `targets` those of this step; a step without any is ignored.
        """
        before, self.skipped = self.skipped, skipped
        if not targets:
            return ""
        self.in_a_row = self.in_a_row + 1 if skipped > before else 0
        if self.in_a_row > self.max_skipped:
            first = step - self.in_a_row + 1
            return f"steps {first} to {step} are not finite in loss or gradient, max_skipped is {self.max_skipped}"
        if self.in_a_row:
            return ""
        mean = statistics.fmean(self.recent) if len(self.recent) == WINDOW else loss
        self.recent.append(loss)
        if self.max_loss_rise and loss - mean > self.max_loss_rise:
            return (
                f"loss {loss:.3f} of step {step} is {loss - mean:.3f} above the mean of the {WINDOW} steps before, "
                f"max_loss_rise is {self.max_loss_rise}"
            )
        return ""
