"""Checks of a config before the workdir is touched."""

import pytest
import training

from rwkv_jax.train.assemble import assembled


@pytest.mark.parametrize(
    "field, value",
    [
        ("accumulation", 0), ("seed", 2**32), ("keep", 0), ("eval_tokens", 1), ("optim.lr", 0.0),
        ("optim.clip", float("inf")), ("optim.warmup", 2.0), ("optim.betas", (0.9, 0.99, 0.999)),
        ("optim.groups", (("(", 2.0),)), ("optim.groups", ("^emb/", 0.0)), ("model.dtype", "float31"),
        ("steps", 2**31),
        ("finetune.targets", "(" * 5000), ("finetune.targets", "a{99999999999}"),
    ],
)  # fmt: skip
def test_assembled_names_the_field_of_a_value_out_of_range(field, value, text, tmp_path):
    config = training.config(text)
    section, _, name = field.rpartition(".")
    with config.unlocked():
        (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=f"(config|model) field (model.)?{name if 'model' in section else field} "):
        assembled(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"segments": 5}, "seq_len is 16, expected a multiple of 5 segments"),
        ({"data": {"order": "shuffled"}}, "data.order is 'shuffled' with carry_state, expected 'documents'"),
        ({"model": {"name": "transformer"}}, "carry_state is True and segments 2, .* a state that grows"),
        ({"model": {"vocab_size": 200}}, "model.vocab_size is 200, expected at least 256, .* tokenizer 'bytes'"),
    ],
)
def test_assembled_refuses_fields_that_contradict_each_other(changes, line, text, tmp_path):
    config = training.config(text, carry_state=True, segments=2, data={"order": "documents"})
    config.update(changes)
    with pytest.raises(ValueError, match=line):
        assembled(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
