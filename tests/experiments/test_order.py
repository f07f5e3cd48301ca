"""The experiment on the order of a prompt: its two prompts, and its verdicts."""

import numpy as np
import pytest

from experiments.order import run

PAIRS, MOST, V = np.array([1, 2, 4] * 12), 4, 20
ASK, ANSWER, BLANK = 17, 18, 19


def parts(row, n, order):
    """(question, data) of a row with n pairs; the positions before them are blank."""
    begin = 2 * (MOST - n)
    assert (row[:begin] == BLANK).all() and row[-2] == ANSWER
    prompt = row[begin:-2]
    return (prompt[:2], prompt[2:]) if order == "first" else (prompt[-2:], prompt[:-2])


def test_asked_gives_both_orders_the_same_question_data_and_answer():
    batches = [run.asked(np.random.default_rng(0), PAIRS, MOST, V, order) for order in run.ORDERS]
    for batch in batches:
        mask = batch["mask"]
        assert mask.shape == (len(PAIRS), 2 * MOST + 3) and mask[:, -1].all() and mask.sum() == len(PAIRS)
    places = {n: set() for n in PAIRS.tolist()}
    for first, last, n in zip(*(batch["tokens"] for batch in batches), PAIRS.tolist(), strict=True):
        question, data = parts(first, n, "first")
        same_question, same_data = parts(last, n, "last")
        assert (question == same_question).all() and (data == same_data).all() and first[-1] == last[-1]
        pairs = dict(data.reshape(n, 2).tolist())
        assert question[0] == ASK and first[-1] == pairs[question[1]]
        assert len(pairs) == n == len(set(pairs.values()))
        assert max(pairs) < 8 <= min(pairs.values()) and max(pairs.values()) < 16
        places[n].add(list(pairs).index(question[1]))
    assert places == {n: set(range(n)) for n in places}  # the asked pair is at any place
    with pytest.raises(ValueError, match="9 pairs do not fit a vocabulary of 20"):
        run.asked(np.random.default_rng(0), np.array([9]), 9, 20, "first")


@pytest.mark.parametrize(
    "differences, control, is_learned, verdict",
    [
        ([0.2, 0.1], [0.0, 0.01], True, "same sign"),
        ([0.2, 0.1], [0.0, 0.01], False, "not comparable"),
        ([0.2, 0.1], [0.3, 0.2], True, "not resolved"),  # the control depends on the order more
        ([0.2, 0.01], [0.0, 0.0], True, "not resolved"),
        ([-0.2, -0.1], [0.0, 0.0], True, "contradicted"),
    ],
)
def test_order_verdict_needs_every_seed_and_a_control_that_learned(differences, control, is_learned, verdict):
    assert run.verdict(differences, control, is_learned) == verdict
