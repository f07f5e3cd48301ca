"""The experiment on the order of a prompt: its two prompts, and its verdicts."""

import numpy as np
import pytest

from experiments import study
from experiments.order import run

PAIRS, MOST, V = np.array([1, 2, 4] * 12), 4, 20
ASK, ANSWER, BLANK = 17, 18, 19


@pytest.fixture(scope="module")
def prompts():
    return [run.asked(np.random.default_rng(0), PAIRS, MOST, V, order) for order in run.ORDERS]


def parts(row, n, order):
    """(question, data) of a row with n pairs; what stands before them is blank."""
    begin = 2 * (MOST - n)
    assert (row[:begin] == BLANK).all() and row[-2] == ANSWER
    prompt = row[begin:-2]
    return (prompt[:2], prompt[2:]) if order == "first" else (prompt[-2:], prompt[:-2])


def test_prompts_of_both_orders_ask_the_same(prompts):
    for first, last, n in zip(*(batch["tokens"] for batch in prompts), PAIRS, strict=True):
        for a, b in zip(parts(first, n, "first"), parts(last, n, "last"), strict=True):
            assert (a == b).all()
        assert first[-1] == last[-1]


@pytest.mark.parametrize("i, order", list(enumerate(run.ORDERS)))
def test_prompt_ends_with_the_value_of_the_key_asked_for(prompts, i, order):
    tokens, mask = prompts[i]["tokens"], prompts[i]["mask"]
    assert mask.shape == (len(PAIRS), 2 * MOST + 3) and mask[:, -1].all() and mask.sum() == len(PAIRS)
    places = {n: set() for n in PAIRS.tolist()}
    for row, n in zip(tokens, PAIRS.tolist(), strict=True):
        (ask, key), data = parts(row, n, order)
        pairs = dict(data.reshape(n, 2).tolist())
        assert ask == ASK and row[-1] == pairs[key]
        assert len(pairs) == n == len(set(pairs.values()))
        assert max(pairs) < 8 <= min(pairs.values()) and max(pairs.values()) < 16
        places[n].add(list(pairs).index(key))
    assert places == {n: set(range(n)) for n in places}  # any of the pairs, not one place


def test_prompt_of_pairs_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 pairs do not fit a vocabulary of 20"):
        run.asked(np.random.default_rng(0), np.array([9]), 9, 20, "first")


@pytest.mark.parametrize("right", [0.1, 1.0])
def test_conclude_says_that_a_control_at_chance_learned_neither_order(right):
    last = lambda right: {"curve": [{order: [right] * 5 for order in run.ORDERS}]}
    its = study.Study(**run.STUDY)
    values = {study.name_of(arm, s): last(1.0 if arm == "rwkv4" else right) for arm in run.ARMS for s in range(2)}
    (row,) = run.conclude(its, values)["ledger"]
    assert ("the transformers are at chance" in row["ours"]) == (right < 0.5)


@pytest.mark.parametrize(
    "differences, control, verdict",
    [
        ([0.2, 0.1], [0.0, 0.01], "same sign"),
        ([0.2, 0.1], [0.3, 0.2], "not resolved"),  # the control cares more
        ([0.2, 0.01], [0.0, 0.0], "not resolved"),
        ([-0.2, -0.1], [0.0, 0.0], "contradicted"),
    ],
)
def test_verdict_needs_every_seed_and_the_control(differences, control, verdict):
    assert run.verdict(differences, control) == verdict
