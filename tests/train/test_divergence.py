"""Runs that end themselves: too many steps that are not finite, or a leap of the loss."""

import pytest

from rwkv_jax.train import divergence

NAN = float("nan")


def test_watch_tolerates_max_skipped_steps_in_a_row():
    watch = divergence.Watch(max_skipped=2, max_loss_rise=1.0, skipped=5)
    skipped = [6, 7, 7, 8, 8]
    assert not any(watch.problem(i, NAN if i in (1, 2, 4) else 3.0, skipped[i - 1], 1) for i in range(1, 6))
    assert not watch.problem(6, NAN, 9, 1) and not watch.problem(7, NAN, 10, 1)
    assert not any(watch.problem(8, NAN, skipped, 0) for skipped in (11, 12, 13))  # without a target: not divergence
    assert watch.problem(8, NAN, 14, 1).startswith("steps 6 to 8 are not finite")


@pytest.mark.parametrize("limit, step", [(1.0, 43), (0.0, None), (0.4, 21)])
def test_watch_compares_a_loss_with_the_mean_of_the_20_finite_steps_before(limit, step):
    """The loss leaps by 0.5 in step 21, and to 1.1 above the mean in step 43; before step 21 no loss counts as a
    leap."""
    watch = divergence.Watch(max_skipped=2, max_loss_rise=limit, skipped=0)
    losses = [9.0, *[2.0] * 19, 2.35 + 0.5, NAN, *[3.0] * 20, 4.1]
    found = {i: watch.problem(i, loss, int(i >= 22), 1) for i, loss in enumerate(losses, 1)}
    first = next((i for i, problem in found.items() if problem), None)
    assert first == step
