"""The experiment on bfloat16: verdicts on paired differences, and on the same seed twice."""

import numpy as np
import pytest

from experiments.bf16 import run


def _values(added, again="a"):
    """Cells of the experiment: seed s of an arm is at 2 + s / 10 + what bfloat16 adds, on two documents."""
    cells = {}
    for arm, extra in zip(run.ARMS, (0.0, added, added), strict=True):
        for seed, jitter in zip((0, 1, 2), (0.0, 1e-4, -1e-4), strict=True):
            level = 2 + seed / 10 + extra + (jitter if extra else 0)
            nats = [level * np.log(2) * n for n in (100, 300)]
            cell = {"bits_per_byte": level, "document_nats": nats, "document_bytes": [100, 300]}
            cells[f"{arm}, seed {seed}"] = cell | {"parameters_sha256": "a", "curve": {}}
    return cells | {
        f"{arm}, seed 0, again": {"parameters_sha256": again, "curve": {}} for arm in run.PRESETS["cpu"].repeated
    }


@pytest.mark.parametrize(
    ("added", "verdict"),
    [(0.002, "reproduced"), (0.03, "contradicted"), (0.0101, "not resolved"), (-0.1, "reproduced")],
)
def test_conclude_judges_the_paired_difference(added, verdict):
    found = run.conclude(run.PRESETS["cpu"], _values(added))
    its = found["against_float32"]["bfloat16 activations"]
    assert its["mean"] == pytest.approx(added) and its["low"] < added < its["high"]
    assert [row["verdict"] for row in found["ledger"]] == [verdict, verdict, "reproduced"]


def test_conclude_contradicts_where_a_seed_gives_other_bits():
    found = run.conclude(run.PRESETS["cpu"], _values(0.002, again="b"))
    assert found["ledger"][-1]["verdict"] == "contradicted" and not any(found["same_bits"].values())
