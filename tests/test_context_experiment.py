"""The experiment on context: what is read before what, gains by distance, the copy task, and stages of windows."""

import numpy as np
import pytest
from small import made

from experiments import tasks
from experiments.context import conclusions, copying, reading, run
from rwkv_jax import corpora, evaluate


def split_of(*lengths):
    """Documents of bytes 1 to 10, each behind its separator."""
    rng = np.random.default_rng(0)
    tokens = [np.concatenate([[0], rng.integers(1, 11, n)]) for n in lengths]
    starts = np.cumsum([0, *map(len, tokens[:-1])])
    return corpora.Split(np.concatenate(tokens), starts, (), sum(lengths))


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.setattr(reading, "TARGET", 4)
    monkeypatch.setattr(reading, "TOKENS_AT_ONCE", 32)
    return reading.targets(split_of(30, 11, 12, 40), 5, context=8, longest=25)


def test_targets_have_their_context_within_their_document(targets):
    lengths = np.diff(targets.text.starts, append=len(targets.text.tokens)) - 1
    assert lengths.tolist() == [25, 12, 25]  # the one of 11 bytes is too short, the others end after 25
    places = (targets.at_N - targets.text.starts[targets.document_N] - 1).tolist()
    assert all(place in (8, 12, 16, 20) for place in places) and set(targets.document_N.tolist()) == {0, 1, 2}
    assert len(set(targets.at_N.tolist())) == 5
    with pytest.raises(ValueError, match="no held-out document has the 54 bytes"):
        reading.targets(split_of(30, 40), 5, context=50, longest=100)


def test_bits_after_a_context_are_those_of_a_reading_that_begins_there(targets):
    model, params = made("rwkv4")
    bits_N = reading.bits_after(model, params, targets, context=3)
    at = targets.at_N[2]
    read = targets.text.tokens[None, at - 3 : at + 4]
    nats_BT, _ = evaluate.log_likelihoods(model, params, read)
    assert bits_N.shape == (5,) and bits_N[2] == pytest.approx(-float(nats_BT[0, -4:].mean()) / np.log(2), rel=1e-5)


def test_all_of_a_document_before_a_target_is_what_a_carried_state_has(targets):
    model, params = made("rwkv4")
    text = targets.text
    carried_N = evaluate.carried(model, params, text.tokens, text.starts, 8, 2)
    reset_N = evaluate.windows(model, params, text.tokens, 8, 2)
    first = np.flatnonzero(targets.at_N == text.starts[targets.document_N] + 9)[0]
    # after the separator and 8 bytes, which is all there is
    wide = reading.bits_after(model, params, targets, context=9)[first]
    assert reading.bits_of(carried_N, targets)[first] == pytest.approx(wide, rel=1e-4)
    assert abs(reading.bits_of(reset_N, targets) - reading.bits_of(carried_N, targets)).max() > 1e-3


def test_gains_are_of_documents_that_have_all_distances():
    text = split_of(3, 9, 8)
    reset_N, carried_N = np.zeros(len(text.tokens)), np.zeros(len(text.tokens))
    start = text.starts[1] + 1
    reset_N[start + 2 : start + 4] = np.log(2)  # bytes 3 and 4 of the second document
    carried_N[start + 4 :] = np.log(2)  # and all of the third
    assert reading.gain_by_distance(reset_N, carried_N, text, (2, 4, 8)) == [[1, -1], [-1, -1]]
    with pytest.raises(ValueError, match="no held-out document has 10 bytes"):
        reading.gain_by_distance(reset_N, carried_N, text, (2, 10))


def test_reach_by_hand():
    assert reading.reach((1, 10, 100), [3.0, 2.05, 2.0]) == pytest.approx(10)
    assert reading.reach((1, 10, 100), [3.0, 2.5, 2.0], 0.75) == pytest.approx(10**1.5)
    assert reading.reach((1, 10), [2.0, 2.5]) == 1  # context does harm


def test_differences_are_paired_by_document_and_weighted_by_targets():
    cell = {"targets": [3, 1], "after": {"8": [2.0, 3.0], "16": [1.0, 3.0]}}
    value, low, high = conclusions.difference([cell], lambda c: c["after"]["16"], lambda c: c["after"]["8"])
    assert (value, low, high) == (-0.75, -1, 0)
    other = cell | {"after": {"8": [2.0, 3.0], "16": [0.0, 2.0]}}
    both = conclusions.difference([cell, cell], lambda c: c["after"]["16"], lambda c: c["after"]["16"], [other, other])
    assert both == (1, 1, 1)


def test_the_longest_lag_solved_ends_at_the_first_that_is_not():
    assert conclusions.longest_solved({"4": 1.0, "8": 0.99, "16": 0.5, "32": 1.0}) == 8
    assert conclusions.longest_solved({"4": 0.9}) == 0


def test_a_row_of_the_copy_task_can_be_answered_by_its_lag():
    lag_B = np.array([1, 3, 6])
    batch = copying.batch(lag_B, 8, np.random.default_rng(0))
    tokens, mask = batch["tokens"], batch["mask"]
    assert tokens.shape == (3, 9) and mask.shape == (3, 8) and mask.sum() == 3 and mask[:, -1].all()
    for row, lag in zip(tokens, lag_B, strict=True):
        assert row[7] == copying.ASK and np.flatnonzero(row == copying.STORE).tolist() == [7 - lag - 1]
        assert row[8] == row[7 - lag] >= 2
    with pytest.raises(ValueError, match="lags are 1 to 7, expected 1 to 6 in 8 tokens"):
        copying.batch(np.array([1, 7]), 8, np.random.default_rng(0))


def test_stages_read_as_many_tokens_a_step_in_longer_windows():
    preset = run.PRESETS["smoke"]
    batch = run.copy_batch(preset, ((1, 2), (2, 3), (4, 1)), seed=0)
    assert [batch(i)["mask"].shape for i in range(6)] == [(4, 8)] * 2 + [(2, 16)] * 3 + [(1, 32)]


def test_training_goes_on_from_given_parameters_and_leaves_them():
    preset, model = run.PRESETS["smoke"], run.copy_model()
    batch = run.copy_batch(preset, ((1, 2),), seed=0)
    first, _ = tasks.fit(model, batch, lr=1e-2, steps=1)
    before = np.array(first["emb"]["embedding"])
    second, _ = tasks.fit(model, batch, lr=1e-9, steps=1, params=first)
    np.testing.assert_array_equal(first["emb"]["embedding"], before)  # still there
    np.testing.assert_allclose(second["emb"]["embedding"], before, atol=1e-7)
