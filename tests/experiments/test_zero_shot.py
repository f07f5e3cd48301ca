"""Zero-shot: the expected numbers, and the criteria for reproduced."""

import numpy as np

from experiments.zero_shot import run

MEANS = [  # means of the 13 accuracies, as printed in RWKV-LM's figure of the same numbers
    44.13, 44.14, 43.42, 48.04, 48.39, 47.25, 53.91, 53.55, 52.64, 57.93, 57.64, 55.92, 61.20, 60.44, 61.34, 63.71,
    62.38, 64.58,
]  # fmt: skip


def test_zero_shot_expected_numbers_have_the_published_means():
    rows = run.EXPECTED["rows"]
    accuracies = [[row["values"][task] for task in run.EXPECTED["metrics"]] for row in rows]
    np.testing.assert_allclose([round(np.mean(row), 2) for row in accuracies], MEANS, atol=0.005)
    assert [row["mean"] for row in rows] == MEANS
    assert len(run.PARAMETERS) == 6 and "ctx4096" in [*run.PARAMETERS][3] and "ctx8192" in [*run.PARAMETERS][5]
    for checkpoint in run.PARAMETERS:
        assert f"--model={checkpoint}.pth --add_bos_token --tasks=piqa," in run.harness_command(checkpoint)


def test_zero_shot_conclude_judges_the_scorer_by_every_comparison():
    def verdict(nats=2e-5, flags_equal=True, of_long_text=3e-5):
        cell = {"requests": 4, "nats": nats, "flags_equal": flags_equal}
        long_text = {"tokens": 900, "nats": of_long_text, "nats_as_answered": 3e-4, "float32_spacing": 5e-4}
        told = run.conclude(run.PRESETS["cpu"], {"one pass": cell, "harness": cell | {"long_text": long_text}})
        assert "3e-04 as lm_eval rounds it" in told["ledger"][1]["details"]
        return told["ledger"][1]["verdict"]

    assert verdict() == "reproduced"
    assert {verdict(nats=2e-4), verdict(flags_equal=False), verdict(of_long_text=2e-4)} == {"contradicted"}


def test_zero_shot_differences_are_the_largest_of_nats_and_any_of_flags():
    scored, expected = [(-1.0, True), (-2.5, False)], [(-1.25, True), (-2.0, False)]
    assert run.differences(scored, expected) == {"requests": 2, "nats": 0.5, "flags_equal": True}
    assert not run.differences(scored, [(-1.0, True), (-2.5, True)])["flags_equal"]
