"""The experiment on bfloat16: verdicts. test_ledger.py recomputes its conclusions from the committed cells."""

import pytest

from experiments.bf16 import run


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.01, 0.009, "reproduced"),
        (0.009, 0.011, "not resolved"),
        (0.011, 0.02, "contradicted"),
        (None, None, "not resolved"),  # one seed
    ],
)
def test_bf16_verdict_has_a_threshold_of_a_hundredth_of_a_bit(low, high, verdict):
    assert run.verdict(low, high) == verdict
