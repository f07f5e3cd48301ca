"""Runs of RWKV-5, 6 and 7 by their recipes: longer windows from a trunk, state carried over segments, strategies."""

from pathlib import Path

import pytest
import training

from rwkv_jax import train
from rwkv_jax.train import run_config

ROOT = Path(__file__).parents[2]
LATER = pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])


def _config(kind, text, **changes):
    config = run_config.read(f"{ROOT / 'configs' / 'tiny.py'}:{kind}")
    config.update_from_flattened_dict(training.FIELDS | {"corpus": text, "model.head_size": 16, "steps": 4})
    config.update(changes)
    return config


@pytest.mark.slow
@LATER
def test_run_continues_its_trunk_with_longer_windows(kind, text, tmp_path):
    trunk = train.run(_config(kind, text), tmp_path / "trunk")
    branch = {"branch_from": str(tmp_path / "trunk" / "checkpoints" / "4"), "seq_len": 32, "batch_size": 2}
    longer = _config(kind, text, steps=6, diagnostics_every=1, **branch)
    longer.optim.update(schedule="constant", lr=1e-9)
    state = train.run(longer, tmp_path / "longer")
    losses, before = training.losses(tmp_path / "longer"), training.losses(tmp_path / "trunk")
    assert list(losses) == [5, 6] and int(state.step) == 6
    assert all(loss < before[1] for loss in losses.values())  # it starts from the trained parameters of the trunk
    assert not training.same(state.params, trunk.params)


@pytest.mark.slow
@LATER
def test_strategies_agree_on_a_run_whose_rows_carry_their_state(kind, text, tmp_path):
    carried = {"carry_state": True, "segments": 2, "stop_gradient": True, "data": {"order": "documents"}}
    losses = {}
    for strategy in ("single", "pmap", "fsdp"):
        train.run(_config(kind, text, strategy=strategy, **carried), tmp_path / strategy)
        losses[strategy] = [*training.losses(tmp_path / strategy).values()]
    assert len(losses["single"]) == 4
    assert losses["pmap"] == pytest.approx(losses["single"], rel=1e-4)
    assert losses["fsdp"] == pytest.approx(losses["single"], rel=1e-4)
