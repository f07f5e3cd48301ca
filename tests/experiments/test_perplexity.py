"""The experiment on perplexity: branches of a trunk, sweeps, intervals, and conclusions from levels."""

import jax
import numpy as np
import pytest
import training

import rwkv_jax
from experiments import sweeps, text
from experiments.perplexity import conclude, run
from experiments.statistics import paired_bits
from rwkv_jax import train

# -------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("step", ["toy", pytest.param("rwkv4", marks=pytest.mark.slow)])
def test_decayed_branch_of_a_trunk_is_bit_equal_to_a_run_of_its_length(step, tmp_path, monkeypatch):
    """The trunk stops at 9 and at 18, and both budgets decay from there."""
    if step == "toy":
        training.install_toy(monkeypatch)
        monkeypatch.setattr(rwkv_jax, "load", lambda workdir: (None, None))
    corpus = tmp_path / "text"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"{i} bottles of beer on the wall, " * 4)

    def small(steps):
        preset = run.Preset(num_layers=1, dim=8, seq_len=8, batch_size=2, text=str(corpus))
        return run.config_of(preset, "rwkv4", seed=3, steps=steps, lr=1e-2)

    runs = tmp_path / "runs"
    found = {b: text.decayed(small(20), (10, 20), b, runs)[1] for b in (20, 10)}
    assert {path.name for path in runs.iterdir()} == {"trunk-9", "trunk-18", "20", "10"}
    for budget, params in found.items():
        whole = small(budget)
        whole.optim.warmup = 1 / budget  # of both: one step, a twentieth of the longest
        expected = train.run(whole, tmp_path / f"whole-{budget}").params
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    before = (runs / "10" / "metrics.jsonl").read_bytes()
    _, again, workdirs = text.decayed(small(20), (10, 20), 10, runs)
    assert workdirs == [runs / "trunk-9", runs / "10"] and (runs / "10" / "metrics.jsonl").read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, again, found[10])


def test_config_of_a_run_has_the_fields_of_its_preset():
    config = run.config_of(run.PRESETS["gpu"], "hybrid", 1, 100)
    assert config.model.layers == ("rwkv4", "attention") and config.model.dropout == 0.1
    assert config.optim.weight_decay == 0.1 and config.seed == 1 and config.seq_len == 1024
    assert run.config_of(run.PRESETS["paper"], "transformer", 0, 100).optim.lr_end == 1e-5


def test_cells_begin_with_seed_0_of_the_three_arms_of_table_5(tmp_path):
    names = list(run.cells(run.PRESETS["cpu"], tmp_path))
    assert names[1:4] == [f"{arm} seed 0 after 120" for arm in ("rwkv4", "transformer", "transformer+shift")]
    assert names[9] == "transformer+shift seed 0 after 480" and names[10] == "lstm seed 0 after 120"
    assert len(names) == 8 * 3 + 3


# ------------------------------------------------------------------------------------------------ sweeps


def test_sweep_extends_until_its_best_rate_is_inside(tmp_path, capsys):
    tried = []

    def loss_of(lr):
        tried.append(lr)
        return abs(np.log2(lr / 16e-3))

    path = tmp_path / "sweep.json"
    sweeps.bracket(path, "rwkv4 4x96", 2.2e-3, loss_of, steps=5)
    assert tried == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
    assert sweeps.lr(path, "rwkv4", 4, 96) == 16e-3
    sweeps.bracket(path, "rwkv4 4x96", 2.2e-3, loss_of, steps=5)
    assert len(tried) == 6 and len(capsys.readouterr().out.splitlines()) == 6


def test_rates_between_swept_widths_are_interpolated_in_log_log(tmp_path):
    none = tmp_path / "sweep.json"
    assert sweeps.lr(none, "transformer+shift", 4, 128) == 4e-3 and sweeps.lr(none, "lstm", 4, 128) is None
    assert sweeps.lr(none, "rwkv4", 3, 32) == pytest.approx(sweeps.lr(none, "rwkv4", 2, 64))
    assert sweeps.lr(none, "rwkv4", 3, 90) == pytest.approx((16e-3 * 8e-3) ** 0.5, rel=0.02)
    assert 6e-4 < sweeps.lr(none, "rwkv4", 12, 512) < 4e-3


# ------------------------------------------------------------------------------------------- differences


def test_paired_bits_give_the_wider_interval_of_seeds_and_documents():
    a_SD = np.log(2) * np.array([[30.0, 300.0], [32.0, 330.0]])
    b_SD = np.log(2) * np.array([[20.0, 200.0], [20.0, 200.0]])
    mean, low, high = paired_bits(a_SD, b_SD, [10, 100])
    by_seed = np.array([110, 142]) / 110
    assert mean == pytest.approx(by_seed.mean())
    half = 12.7062 * by_seed.std(ddof=1) / np.sqrt(2)
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-4)
    mean, low, high = paired_bits(a_SD[:1], b_SD[:1], [10, 200])  # one seed: documents alone, of 1 and 0.5 bits a byte
    assert mean == pytest.approx(110 / 210) and (low, high) == pytest.approx((0.5, 1.0))
    assert np.isnan(paired_bits(a_SD[:1, :1], b_SD[:1, :1], [10])[1:]).all()


def test_times_fewer_tokens_is_interpolated_and_bounded():
    baseline = [(1e6, 3.0), (2e6, 2.5), (4e6, 2.0)]
    factor = lambda bits: conclude.times_fewer(list(zip((1e6, 2e6, 4e6), bits, strict=True)), baseline)
    assert factor((3.0, 2.0, 1.5)) == {"factor": pytest.approx(2), "bound": None}
    assert factor((2.5, 1.5, 1.2)) == {"factor": pytest.approx(8**0.5), "bound": None}
    assert factor((1.9, 1.5, 1.2)) == {"factor": 4, "bound": "at least"}
    assert factor((3.5, 3.0, 2.1)) == {"factor": 1, "bound": "less than"}


def test_gaps_at_equal_compute_are_interpolated_between_budgets():
    points = {
        "transformer": [(2.0, 3.0), (8.0, 1.0)],
        "rwkv4": [(1.0, 2.5), (4.0, 1.5)],
        "far": [(9.0, 1.0), (10.0, 0.9)],
    }
    gaps = conclude.gaps_at_equal(points)
    assert gaps["rwkv4"] == {"at": 4.0, "bits_per_byte": pytest.approx(1.5 - 2.0)}
    assert gaps["far"]["bits_per_byte"] is None and gaps["transformer"]["bits_per_byte"] == 0


@pytest.mark.parametrize(
    ("low", "high", "comparable", "expected"),
    [
        (0.03, 0.05, True, "reproduced"),
        (0.05, 0.07, True, "same sign"),
        (-0.05, -0.03, True, "contradicted"),
        (-0.01, 0.05, True, "not resolved"),
        (None, None, True, "not resolved"),
        (0.03, 0.05, False, "not comparable"),
    ],
)
def test_verdict_follows_the_header(low, high, comparable, expected):
    assert conclude.verdict({"low": low, "high": high}, 0.041, 1, comparable) == expected
    if comparable and low and expected != "not resolved":  # against a claim of the other sign without a number
        assert conclude.verdict({"low": low, "high": high}, None, -1, True) == (
            "same sign" if low < 0 else "contradicted"
        )


def test_conclude_computes_every_conclusion_from_cells():
    """Levels of 3, 2 and 1 bits a byte after the longest budget, where the 6-gram has 2.5."""
    preset = run.Preset(arms=(("rwkv4", 2), ("transformer", 1), ("transformer+shift", 1)), budgets=(10, 20))
    levels = {"rwkv4": (3.0, 1.0), "transformer": (4.0, 3.0), "transformer+shift": (3.0, 2.0)}
    values = {
        "corpus": {"test_bytes_by_document": [100.0, 300.0]},
        "speed": {"tokens_per_second": {"rwkv4": 20, "transformer": 10, "transformer+shift": 10}},
        "counted": {"budgets": {str(b): {"unigram": 5.0, "6-gram": 2.5, "xz": 2.0} for b in (10, 20)}},
    }
    for arm, seeds in preset.arms:
        for seed in range(seeds):
            for budget, bits in zip(preset.budgets, levels[arm], strict=True):
                nats = [100 * bits * np.log(2), 300 * bits * np.log(2)]
                values[f"{arm} seed {seed} after {budget}"] = {
                    "tokens": 1000 * budget, "flops_per_token": 7, "lr": 1, "parameters": 5,
                    "bits_per_byte": bits, "best_practice_bits_per_byte": bits, "nats": nats,
                    "best_practice_nats": nats, "trunk": {"tokens": [budget], "loss_nats": [bits]},
                }  # fmt: skip
    found = conclude.conclude(preset, values)
    assert found["did_not_beat_counting"] == ["transformer"]
    assert [row["verdict"] for row in found["ledger"]] == ["not comparable", "contradicted"]
    last = found["arms"]["rwkv4"]["budgets"][-1]
    assert last["seconds"] == 1000 and last["flops"] == 140_000
    assert last["windows"]["minus"]["transformer"] == {
        "bits_per_byte": pytest.approx(-2), "low": pytest.approx(-2), "high": pytest.approx(-2), "seeds": 1
    }  # fmt: skip
    assert found["share_of_gap_that_token_shift_closes"] == pytest.approx(0.5)
    assert found["tokens_of_transformer_over_own"]["rwkv4"]["bound"] == "at least"
    assert "behind the 6-gram 2.500" in found["ledger"][0]["ours"]
