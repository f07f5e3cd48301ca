"""Time and memory against context: the law and its inverse, the integral, caches, and verdicts."""

import dataclasses

import numpy as np
import pytest
from small import drawn

from experiments.inference import conclusions, run

M169 = (12, 768, run.NEOX)


@pytest.mark.parametrize(("size", "ten", "hundred"), [(M169, 16, 22), ((32, 4096, run.NEOX), 61, 83)])
def test_law_and_batch_for_agree_on_the_least_batch_for_a_factor(size, ten, hundred):
    L, D, V = size
    assert conclusions.law(*size, 4096, 3) == pytest.approx(1 + 2 * 3 * 4096 * D * L / (V * D + 13 * D**2 * L))
    for factor, tokens, batch in ((10, 4096, ten), (100, 32768, hundred)):
        assert conclusions.batch_for(factor, tokens, *size) == batch
        assert conclusions.law(*size, tokens, batch) >= factor > conclusions.law(*size, tokens, batch - 1)


def test_cumulative_integrates_time_between_positions():
    rows = [{"position": p, "seconds": 1 + p / 100} for p in (0, 100, 300)]
    for tokens in (50, 100, 250, 300):
        assert conclusions.cumulative(rows, tokens) == pytest.approx(tokens + tokens**2 / 200)
    assert conclusions.cumulative(rows[1:], 50) == pytest.approx(50 * 2)  # before the first position
    line = lambda power: [{"position": p, "seconds": p**power} for p in range(10)]
    assert conclusions.straightness(line(1)) == pytest.approx(1) and conclusions.straightness(line(2)) < 0.95


def test_filled_cache_holds_noise_up_to_its_position():
    model = run.built(run.Shape(2, 32, 64), "float32", "transformer", scan=False)
    state = run.filled(model, batch=3, position=300, slots=512)
    assert all(entry.cache.k_BHSK.shape == (3, 1, 512, 32) for entry in state)
    assert all((np.asarray(entry.cache.length_B) == 300).all() for entry in state)
    assert np.asarray(state[0].cache.v_BHSK).std() == pytest.approx(1, abs=0.05)


def test_latency_leaves_out_caches_that_do_not_fit(monkeypatch):
    shape = run.Shape(1, 32, 64, (1,))
    preset = dataclasses.replace(run.SMOKE, positions=(0, 700), rounds=1)
    model = run.built(shape, "float32", "transformer", scan=False)
    monkeypatch.setattr(run, "random_parameters", lambda model: drawn(model)[1])  # saves one program for each tensor
    parameters = run.total_bytes(drawn(model)[1])
    slot = 2 * 32 * 4  # bytes for the keys and values of a token
    monkeypatch.setattr(run, "memory_bytes", lambda: parameters + 2 * 512 * slot)
    found = run.latency(preset, shape, "transformer", 1)
    assert [row["position"] for row in found["rows"]] == [0]
    assert [(row["position"], row["state_bytes"] // slot) for row in found["left_out"]] == [(700, 768)]
    assert found["rows"][0]["state_bytes"] < 100  # the cache is empty


def _values(ratio):
    """Synthetic cells of a preset; the cached transformer takes `ratio(position, batch)` times as long."""
    at = run.CPU.positions
    cells = {}
    for batch in (1, 8, 32):
        row = lambda p, seconds: {"position": p, "seconds": seconds, "memory_bytes": 100, "state_bytes": 100}
        cells[f"6x512, rwkv4, batch {batch}"] = {"rows": [row(p, 0.002) for p in at]}
        cached = [row(p, 0.002 * ratio(p, batch)) | {"memory_bytes": 100 + p} for p in at if p * batch <= 2**18]
        cells[f"6x512, transformer, batch {batch}"] = {"rows": cached}
    cells["6x512, transformer, no cache, batch 1"] = {"rows": [row(p, 0.002 * p) for p in run.CPU.uncached]}
    for arm, slope in (("rwkv4", 0.002), ("transformer", 0.003)):
        cells[f"6x512, {arm}, generated"] = {"rows": [{"position": p, "seconds": slope * p} for p in (0, 1024, 2048)]}
    for arm, speeds in (("rwkv4, scan", (1000, 990)), ("transformer", (1000, 400)), ("transformer+shift", (900, 300))):
        rows = [
            {"T": T, "tokens_per_second": s, "temporary_bytes": 2**20}
            for T, s in zip((256, 8192), speeds, strict=True)
        ]
        cells[f"training, {arm}"] = {"rows": rows}
    return cells


def test_conclude_judges_claims_at_batch_1_and_lists_batches_where_they_hold():
    law = lambda tokens, batch: conclusions.law(6, 512, 256, tokens, batch)
    found = conclusions.conclude(run.CPU, _values(law))
    verdicts = [row["verdict"] for row in found["ledger"]]
    assert verdicts == ["reproduced", *["no claim"] * 2, "not comparable", *["reproduced"] * 2]
    assert "holds for 6x512 from batch 8, 6x512 from batch 32" in found["ledger"][1]["details"]
    assert "holds at no batch measured" in found["ledger"][2]["details"]  # at batch 8 it is 79, and 32 does not fit
    slower = conclusions.conclude(run.CPU, _values(lambda tokens, batch: 0.9))
    assert [row["verdict"] for row in slower["ledger"][1:4]] == ["no claim", "no claim", "not comparable"]
