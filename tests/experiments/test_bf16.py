"""The experiment on bfloat16: verdicts on paired differences, and on the same seed twice."""

import pytest

from experiments import study
from experiments.bf16 import run

ITS = study.Study(**run.STUDY)


def _values(added, again="a"):
    """Values of the experiment: seed s of an arm is at 2 + s / 10 + what bfloat16 adds."""
    found = {}
    for arm, extra in zip(run.ARMS, (0.0, added, added), strict=True):
        for seed, jitter in enumerate((0.0, 1e-4, -1e-4)):
            level = 2 + seed / 10 + extra + (jitter if extra else 0)
            found[study.name_of(arm, seed)] = {"in_float32": level, "digest": "a", "curve": {}}
    return found | {name: {"digest": again, "curve": {}} for name in ITS.also()}


@pytest.mark.parametrize(
    ("added", "verdict"),
    [(0.002, "reproduced"), (0.03, "contradicted"), (0.0101, "not resolved"), (-0.1, "reproduced")],
)
def test_conclude_judges_the_paired_difference(added, verdict):
    rows = run.conclude(ITS, _values(added))["ledger"]
    assert [row["verdict"] for row in rows] == [verdict, verdict, "reproduced"]
    assert f"{added:+.4f} [" in rows[0]["ours"]


def test_conclude_contradicts_where_a_seed_gives_other_bits():
    assert run.conclude(ITS, _values(0.002, again="b"))["ledger"][-1]["verdict"] == "contradicted"
