"""Intervals, p-values and verdicts, checked by hand."""

import numpy as np
import pytest

from experiments import statistics


def test_t_interval_p_value_and_over_documents_agree_with_values_by_hand():
    x = np.array([1.0, 2.0, 4.0])
    half = 4.302653 * np.std(x, ddof=1) / 3**0.5  # t at 0.975 with 2 degrees of freedom
    np.testing.assert_allclose(statistics.t_interval(x), [7 / 3, 7 / 3 - half, 7 / 3 + half], rtol=1e-6)
    t = 7 / 3 * 3**0.5 / np.std(x, ddof=1)
    assert statistics.p_value(x) == pytest.approx(1 - t / (t**2 + 2) ** 0.5)  # Student's, 2 degrees of freedom
    assert statistics.p_value([0.5, 0.5]) == 0 and statistics.p_value([0.0, 0.0]) == 1
    # 1 bit a byte in five documents, 0.5 in one. It is drawn at least 4 times of 6 with p 0.009, 5 times with 0.0007,
    # and the percentile for six documents is 0.0024.
    nats_SD = np.log(2) * np.array([[10.0] * 5 + [100.0]])
    assert statistics.over_documents(nats_SD, [10] * 5 + [200]) == pytest.approx((420 / 820, 1.0))
    nothing = statistics.over_documents(nats_SD[:, :5], [10] * 5)
    assert np.isnan(
        [*nothing, *statistics.t_interval([1.0])[1:], *statistics.t_interval([]), *statistics.wider(nothing, nothing)]
    ).all()
    assert statistics.wider((0, 1), (-1, 1)) == (-1, 1) and statistics.wider((0, 1), nothing) == (0, 1)
    assert [statistics.at_most(x) for x in (0.0, 1.4e-9, 2e-5, 9.1e-3)] == ["0e+00", "2e-09", "2e-05", "1e-02"]
    assert statistics.told(0.5, -1, 2, 1) == "+0.5 [-1.0, +2.0]" and statistics.told(-0.5, *nothing) == "-0.500"


def test_holm_agrees_with_a_hand_calculation():
    # ordered 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, none below the one before
    np.testing.assert_allclose(statistics.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "sign", "paper", "expected"),
    [
        (0.03, 0.05, 1, 0.041, "reproduced"),
        (0.05, 0.07, 1, 0.041, "same sign"),
        (-0.05, -0.03, 1, 0.041, "contradicted"),
        (-0.01, 0.05, 1, 0.041, "not resolved"),
        (None, None, 1, 0.041, "not resolved"),
        (-0.05, -0.03, -1, None, "same sign"),
    ],
)
def test_statistics_verdict_follows_from_interval_sign_and_paper(low, high, sign, paper, expected):
    assert statistics.verdict(low, high, sign, paper) == expected


def test_over_documents_is_the_interval_of_a_mean_of_many_documents():
    bits_D = np.random.default_rng(3).normal(0.05, 0.1, 200)
    low, high = statistics.over_documents([bits_D * np.log(2) * 50], [50] * 200)
    standard_error = bits_D.std() / 200**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.08)
    assert (high + low) / 2 == pytest.approx(bits_D.mean(), abs=0.2 * standard_error)


def test_tail_widens_a_bootstrap_of_few_documents_to_students_interval():
    assert statistics.tail(10**6) == pytest.approx(0.025, rel=1e-4)
    assert statistics.tail(8) == pytest.approx(0.00574, rel=2e-3)  # z = 2.3646 sqrt(8 / 7)
    draws = np.random.default_rng(0).standard_normal((10**6, 8)).mean(axis=1)  # of 8 documents with deviation 1
    draws *= np.sqrt(7 / 8)  # a bootstrap's deviation
    assert np.quantile(draws, statistics.tail(8)) == pytest.approx(-2.3646 / 8**0.5, rel=0.01)
