"""The experiment on perplexity: configs of its presets, and conclusions from levels."""

from experiments import study, sweeps
from experiments.perplexity import run


def test_config_of_a_run_has_the_fields_of_its_preset():
    of = lambda preset, arm: study.config_of(
        its := study.chosen(study.Study(**run.STUDY), preset), study.arms_of(its)[arm][0]
    )
    config = of("gpu", "transformer+shift")
    assert config.model.variant.token_shift and config.model.dropout == 0.1 and config.model.dim == 512
    assert config.optim.weight_decay == 0.1 and config.seq_len == 1024
    assert of("paper", "transformer").optim.lr_end == 1e-5
    assert of("cpu", "hybrid").model.layers == ("rwkv4", "attention")
    assert of("cpu", "lstm").optim.lr == sweeps.best(run.SWEEP, "lstm 4x128")


def test_conclude_compares_with_nothing_that_counting_beats():
    """Levels of 3, 2 and 1 bits a byte after the longest budget, where the 6-gram has 2.5."""
    fields = {"against": "transformer", "measure": ("bits_per_byte", "best_practice")}
    its = study.Study(base={}, arms={arm: {} for arm in run.MAIN}, budgets=(10, 20), **fields)
    values = {
        "speed": {"tokens_per_second": dict.fromkeys(run.MAIN, 20)},
        "counted": {"budgets": {"20": {"unigram": 5.0, "6-gram": 2.5, "xz": 2.0}}},
    }
    for arm, levels in zip(run.MAIN, ((3.0, 1.0), (4.0, 3.0), (3.0, 2.0)), strict=True):
        for budget, bits in zip(its.budgets, levels, strict=True):
            cell = {"tokens": 1000 * budget, "flops_per_token": 7, "bits_per_byte": bits, "best_practice": bits}
            values[study.name_of(arm, 0, budget)] = cell
    found = run.conclude(its, values)
    assert found["did_not_beat_counting"] == ["transformer"]
    assert [row["verdict"] for row in found["ledger"]] == ["not comparable", "not resolved"]
    assert found["points"]["rwkv4"][-1] == {"tokens": 20_000, "flops": 140_000, "seconds": 1000, "bits_per_byte": 1.0}
    assert "behind the 6-gram 2.500" in found["ledger"][0]["ours"]
