"""The experiment on bfloat16: verdicts on paired differences, and on the same seed twice."""

import pytest

from experiments import study
from experiments.bf16 import run

ITS = study.Study(**run.STUDY)


@pytest.mark.parametrize(
    ("added", "again", "verdicts"),
    [
        (0.002, "a", ["reproduced", "reproduced", "reproduced"]),
        (0.03, "b", ["contradicted", "contradicted", "contradicted"]),  # the second run of a seed has other bits
        (0.0101, "a", ["not resolved", "not resolved", "reproduced"]),
    ],
)
def test_conclude_judges_the_paired_difference_and_the_bits(added, again, verdicts):
    """Seed s of an arm is at 2 + s / 10 + what bfloat16 adds."""
    values = {name: {"digest": again, "curve": {}} for name in ITS.also()}
    for arm, extra in zip(run.ARMS, (0.0, added, added), strict=True):
        for seed, jitter in enumerate((0.0, 1e-4, -1e-4)):
            level = 2 + seed / 10 + extra + (jitter if extra else 0)
            values[study.name_of(arm, seed)] = {"in_float32": level, "digest": "a", "curve": {}}
    rows = run.conclude(ITS, values)["ledger"]
    assert [row["verdict"] for row in rows] == verdicts
    assert f"{added:+.4f} [" in rows[0]["ours"]
