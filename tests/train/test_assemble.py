"""What a config may ask for, checked before the workdir is touched."""

import pytest
import training

from rwkv_jax import train
from rwkv_jax.train.assemble import assembled


@pytest.mark.parametrize(
    "field, value",
    [
        ("accumulation", 0), ("seed", 2**32), ("keep", 0), ("steps", 0), ("eval_tokens", 1), ("log_every", -1),
        ("optim.lr", 0.0), ("optim.lr", float("inf")), ("optim.lr_end", 0.0), ("optim.eps", float("nan")),
        ("optim.warmup", 2.0), ("optim.betas", (0.9, 0.99, 0.999)), ("optim.groups", (("(", 2.0),)),
        ("optim.groups", (("a",),)), ("optim.weight_decay", -0.1), ("optim.clip", float("inf")),
        ("max_loss_rise", -1.0), ("model.dropout", 1.0), ("model.head_size", 0), ("model.dtype", "float31"),
        ("model.wkv_impl", "cuda"),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_by_its_field(field, value, text, tmp_path):
    config = training.config(text)
    section, _, name = field.rpartition(".")
    with config.unlocked():
        (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=f"(config|model) field (model.)?{name if 'model' in section else field} "):
        assembled(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workdir_is_not_created_for_a_config_that_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="config field keep is 0"):
        train.run(training.config(text, keep=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"segments": 5}, "seq_len is 16, expected a multiple of 5 segments"),
        ({"data": {"order": "shuffled"}}, "data.order is 'shuffled' with carry_state, expected 'documents'"),
        ({"model": {"name": "transformer"}}, "carry_state is True and segments 2, .* a state that grows"),
    ],
)
def test_state_that_cannot_be_carried_is_refused(changes, line, text, tmp_path):
    config = training.config(text, carry_state=True, segments=2, data={"order": "documents"})
    config.update(changes)
    with pytest.raises(ValueError, match=line):
        assembled(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
