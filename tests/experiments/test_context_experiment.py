"""The experiment on context: targets and their contexts, gains by distance, the copy task and its stages."""

import numpy as np
import pytest
from small import drawn, forward

from experiments import study
from experiments.context import copying, reading, run
from rwkv_jax import build, data, evaluate

# keeps programs small
MODEL = build("rwkv4", vocab_size=11, num_layers=1, dim=8, scan=False, receptance=False, embedding_norm=False)


def log_p(logits_BTV, tokens_BT):
    logits_BTV = np.asarray(logits_BTV, np.float64)
    chosen_BT = np.take_along_axis(logits_BTV, tokens_BT[..., None], -1)[..., 0]
    return chosen_BT - np.log(np.exp(logits_BTV).sum(-1))


def split_of(*lengths):
    """Documents of bytes 1 to 10, each after its separator."""
    rng = np.random.default_rng(0)
    tokens = [np.concatenate([[0], rng.integers(1, 11, n)]) for n in lengths]
    starts = np.cumsum([0, *map(len, tokens[:-1])])
    return data.Split(np.concatenate(tokens), starts, (), sum(lengths))


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.setattr(reading, "TARGET", 4)
    monkeypatch.setattr(reading, "TOKENS_AT_ONCE", 32)
    return reading.targets(split_of(30, 11, 12, 40), 5, context=8, longest=25)


def test_targets_keep_the_context_within_the_document(targets):
    lengths = np.diff(targets.text.starts, append=len(targets.text.tokens)) - 1
    assert lengths.tolist() == [25, 12, 25]  # the one of 11 bytes is too short, the others end after 25
    places = (targets.at_N - targets.text.starts[targets.document_N] - 1).tolist()
    assert all(place in (8, 12, 16, 20) for place in places) and set(targets.document_N.tolist()) == {0, 1, 2}
    assert len(set(targets.at_N.tolist())) == 5
    with pytest.raises(ValueError, match="no held-out document has the 54 bytes"):
        reading.targets(split_of(30, 40), 5, context=50, longest=100)


def test_bits_after_a_context_equal_those_of_a_pass_over_that_context_alone(targets):
    model, params = drawn(MODEL)
    bits_N = reading.bits_after(model, params, targets, context=9)
    rows = targets.text.tokens[targets.at_N[:, None] + np.arange(-9, 4)]
    nats_BT = -log_p(forward(model, params, rows[:, :-1])[0], rows[:, 1:])
    np.testing.assert_allclose(bits_N, nats_BT[:, -4:].mean(1) / np.log(2), rtol=1e-5)
    # after the separator and 8 bytes: the whole context, as with a state carried from the beginning
    carried_N = evaluate.carried(model, params, targets.text.tokens, targets.text.starts, 8, 2)
    first = np.flatnonzero(targets.at_N == targets.text.starts[targets.document_N] + 9)[0]
    assert reading.bits_of(carried_N, targets)[first] == pytest.approx(bits_N[first], rel=1e-4)


def test_gain_by_distance_uses_documents_that_cover_all_distances():
    text = split_of(3, 9, 8)
    reset_N, carried_N = np.zeros(len(text.tokens)), np.zeros(len(text.tokens))
    start = text.starts[1] + 1
    reset_N[start + 2 : start + 4] = np.log(2)  # bytes 3 and 4 of the second document
    carried_N[start + 4 :] = np.log(2)  # and all of the third
    assert reading.gain_by_distance(reset_N, carried_N, text, (2, 4, 8)) == [[1, -1], [-1, -1]]
    with pytest.raises(ValueError, match="no held-out document has 10 bytes"):
        reading.gain_by_distance(reset_N, carried_N, text, (2, 10))


def test_a_fall_beyond_the_window_is_comparable_only_if_the_model_reads_a_window():
    after = lambda far: {"16": [3.0, 3.0], "256": [2.0, 2.0], "4096": [far, far]}
    cells = lambda far: [{"targets": [10, 10], "after": after(far)}]
    change = (-0.1, -0.2, -0.05)
    assert run.falls(change, cells(1.0), T=256) == "same sign"
    assert run.falls(change, cells(1.99), T=256) == "not comparable"  # 256 bytes give 99 % of the gain
    uneven = [{"targets": [10] * 6, "after": {"16": [3.0] * 6, "256": [1.0] * 5 + [1.5], "4096": [1.0] * 6}}]
    assert run.falls(change, uneven, T=256) == "not comparable"  # 96 %, whatever the interval of the reach


def test_reach_interpolates_in_log_context():
    assert reading.reach((1, 10, 100), [3.0, 2.05, 2.0]) == pytest.approx(10)
    assert reading.reach((1, 10, 100), [3.0, 2.1, 2.0]) == pytest.approx(10**1.5)
    assert reading.reach((1, 10), [2.0, 2.5]) == 1  # longer contexts are worse


def test_difference_pairs_documents_and_weights_them_by_targets():
    cell = {"targets": [3, 1] * 3, "after": {"8": [2.0, 3.0] * 3, "16": [1.0, 3.0] * 3}}
    value, low, high = run.difference([cell], lambda c: c["after"]["16"], lambda c: c["after"]["8"])
    assert (value, low, high) == (-0.75, -1, 0)
    other = cell | {"after": {"8": [2.0, 3.0] * 3, "16": [0.0, 2.0] * 3}}
    both = run.difference([cell, cell], lambda c: c["after"]["16"], lambda c: c["after"]["16"], [other, other])
    assert both == (1, 1, 1)


def test_longest_solved_stops_at_the_first_unsolved_lag():
    assert run.longest_solved({"4": 1.0, "8": 0.99, "16": 0.5, "32": 1.0}) == 8
    assert run.longest_solved({"4": 0.9}) == 0


def test_carrying_is_judged_by_how_much_less_the_state_saves():
    verdicts = ["same sign", "not resolved", "contradicted"]
    assert [run.safe(*interval) for interval in ((0, 0.004), (0, 0.006), (0.006, 1))] == verdicts


def test_copying_batch_has_the_symbol_at_the_lag_as_target():
    lag_B = np.array([1, 3, 6])
    batch = copying.batch(lag_B, 8, np.random.default_rng(0))
    tokens, mask = batch["tokens"], batch["mask"]
    assert tokens.shape == (3, 9) and mask.shape == (3, 8) and mask.sum() == 3 and mask[:, -1].all()
    for row, lag in zip(tokens, lag_B, strict=True):
        assert row[7] == copying.ASK and np.flatnonzero(row == copying.STORE).tolist() == [7 - lag - 1]
        assert row[8] == row[7 - lag] >= 2
    with pytest.raises(ValueError, match="lags are 1 to 7, expected 1 to 6 in 8 tokens"):
        copying.batch(np.array([1, 7]), 8, np.random.default_rng(0))


def test_copying_stage_batches_keep_the_tokens_a_step_in_longer_windows():
    batches = copying.stage_batches(run.TINY_COPY, ((1, 2), (2, 3), (4, 1)), seed=0)
    assert [batches(i)["mask"].shape for i in range(6)] == [(4, 8)] * 2 + [(2, 16)] * 3 + [(1, 32)]


def test_context_extension_and_control_have_equal_tokens_and_constant_rate():
    its = study.Study(**run.STUDY)
    stages = {arm: [study.config_of(its, fields) for fields in found] for arm, found in study.arms_of(its).items()}
    assert stages["extended"][0] == stages["control"][0] == stages["rwkv4"][0]
    assert [(config.seq_len, config.steps) for config in stages["extended"]] == [
        (256, 400), (512, 412), (1024, 532), (2048, 652)
    ]  # fmt: skip
    assert [(config.seq_len, config.steps) for config in stages["control"]] == [(256, 400), (256, 652)]
    for config in (*stages["extended"][1:], stages["control"][1]):
        assert config.seq_len * config.batch_size == 4096 and config.optim.schedule == "constant"
        assert config.optim.lr == config.optim.lr_end == stages["rwkv4"][0].optim.lr / 10


def test_context_conclude_pairs_versions_with_rwkv4_and_copies_by_seed():
    its = study.chosen(study.Study(**run.STUDY), "smoke")  # T 16, contexts 16 and 32
    change = {"rwkv4": 0.02, "rwkv5": 0.01, "rwkv6": -0.03, "rwkv7": 0.04}
    values = {}
    for arm in study.arms_of(its):
        after = {"16": [2.0, 3.0] * 3, "32": [2.0 + change.get(arm, 0), 3.0 + change.get(arm, 0)] * 3}
        cell = {"targets": [1, 3] * 3, "after": after, "gain_by_distance": [[0.1] * 6] * 3}
        values[study.name_of(arm, 0)] = cell
    copied = lambda lag: {"share": {str(n): float(n <= lag) for n in copying.TASK.lags}, "window": 64}
    values |= {name: copied(256) for name in run.COPIES}
    values |= {run.copy_of(name, seed): copied(64) for name in copying.VERSIONS for seed in range(3)}
    values |= {run.copy_of("rwkv4", 2): copied(0), run.copy_of("rwkv7", 0): copied(512)}
    found = run.conclude(its, values)
    rows = {row["artefact"]: row for row in found["ledger"]}
    beyond = lambda what: rows[f"Loss beyond the training length, {what}"]
    assert beyond("RWKV-5 minus RWKV-4")["ours"].startswith("-0.0100 [-0.0100, -0.0100] bits a byte from 16 to 32")
    verdicts = [beyond(f"RWKV-{n} minus RWKV-4")["verdict"] for n in (5, 6)]
    assert verdicts == ["same sign"] * 2 and beyond("RWKV-7")["verdict"] == "contradicted"
    assert found["longest_lag"]["rwkv4"] == [64, 64, 0] and found["longest_lag"]["rwkv7"] == [512, 64, 64]
    lag = lambda found: found["ledger"][-1]["ours"]
    assert lag(found) == "5 times as long as RWKV-4's"  # (8 * 1 * 16)^(1/3)
    assert lag(run.conclude(its, values | {run.copy_of("rwkv7", 1): copied(1024)})).startswith("at least 13 times")
    assert beyond("RWKV-6 minus RWKV-4") in found["ledger"]
    flat = {
        name: cell | {"after": {"16": [2.0, 3.0] * 3, "32": [2.0, 3.0] * 3}}
        for name, cell in values.items()
        if "rwkv4, seed" in name and "copy" not in name
    }
    rows = run.conclude(its, values | flat)["ledger"]
    assert [row["verdict"] for row in rows if "minus RWKV-4" in row["artefact"]] == ["not comparable"] * 2
    without = {name: value for name, value in values.items() if ", rwkv" not in name}
    assert len(run.conclude(its, without)["ledger"]) == len(rows) - 1


def test_also_runs_rwkv4_once_for_its_copy_and_the_versions():
    made = run.also(run.TINY_COPY, seeds=2)
    assert len(made) == len(run.COPIES) + 2 * len(copying.VERSIONS)
    assert made["copy"].args == made[run.copy_of("rwkv4", 0)].args
