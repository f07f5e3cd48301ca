"""Contexts in files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from generating import assert_equal, case, filled, ids, row, unstacked
from judge import error_ratio

from rwkv_jax.generate import load_context, read, save_context

BOTH = pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])


def cast(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype) if x.dtype == np.float32 else x, tree)


@BOTH
def test_saved_context_survives_the_round_trip_bit_exactly(kind, tmp_path):
    """Whatever the layout of the parameters, and the length of its caches."""
    model, params = unstacked(kind)
    path, context = tmp_path / "a.context", filled(kind, 2, room=300)
    save_context(path, context, model, params, text="é\n日")
    assert [path.name for path in tmp_path.iterdir()] == ["a.context"]
    for reader in (unstacked(kind), case(kind)):
        found, text = load_context(path, *reader)
        assert text == "é\n日"
        assert_equal(found, context)
    save_context(path, row(context, 0), model, params)
    found, text = load_context(path, model, params)
    assert text is None
    assert_equal(found, row(context, 0))


@BOTH
def test_saved_context_is_cast_to_the_dtype_of_the_model(kind, tmp_path):
    """And serves the model in either."""
    model, params = unstacked(kind)
    half = model.clone(dtype="bfloat16", param_dtype="bfloat16"), cast(params, jnp.bfloat16)
    context = filled(kind, 2)
    save_context(tmp_path / "a", context, model, params)
    found, _ = load_context(tmp_path / "a", *half)
    wanted = jax.eval_shape(lambda: half[0].init_state(2, max_length=256))
    for x, y, expected in zip(*map(jax.tree.leaves, (found.state, context.state, wanted)), strict=True):
        assert x.dtype == expected.dtype
        np.testing.assert_array_equal(x, y.astype(x.dtype))
    save_context(tmp_path / "b", found, *half)
    assert_equal(load_context(tmp_path / "b", *half)[0], found)


@pytest.mark.slow
def test_saved_context_continues_in_another_dtype(tmp_path):
    model, params = unstacked("hybrid")
    save_context(tmp_path / "a", read(model, params, ids(5)), model, params)
    half = model.clone(dtype="bfloat16", param_dtype="bfloat16"), cast(params, jnp.bfloat16)
    found, _ = load_context(tmp_path / "a", *half)
    assert error_ratio(read(*half, [1], found).logits_BV, read(model, params, [*ids(5), 1]).logits_BV) < 0.1


def test_saved_context_of_another_model_is_refused(tmp_path):
    model, params = unstacked("rwkv4")
    save_context(tmp_path / "a", filled("rwkv4", 1), model, params)
    other = jax.tree.map(lambda x: x, params)
    other["blocks_0"]["att"]["key"]["kernel"] = params["blocks_0"]["att"]["key"]["kernel"] * 1.01
    for wrong in ((model, other), unstacked("hybrid")):
        with pytest.raises(ValueError, match="a is the context of another model") as error:
            load_context(tmp_path / "a", *wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not one of this model"):
        save_context(tmp_path / "b", filled("hybrid", 1), model, params)
    assert not (tmp_path / "b").exists()


@BOTH
def test_saved_context_that_is_damaged_is_refused(kind, tmp_path):
    model, params = unstacked(kind)
    save_context(tmp_path / "good", filled(kind, 1), model, params, "text")
    good, path = (tmp_path / "good").read_bytes(), tmp_path / "bad"
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        load_context(tmp_path / "none", model, params)
    cuts = [*range(0, 40), *range(40, len(good), 997), len(good) - 1]
    for content in (*(good[:cut] for cut in cuts), good + b"x", b"<html>" * 99, b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad: (truncated|damaged)"):
            load_context(path, model, params)
    safetensors.numpy.save_file({"a": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="bad is not a saved context, or one of another version"):
        load_context(path, model, params)


@BOTH
def test_saved_context_with_other_arrays_is_refused(kind, tmp_path):
    model, params = unstacked(kind)
    save_context(tmp_path / "a", filled(kind, 1), model, params)
    arrays = safetensors.numpy.load_file(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model"])["dim"] == 16
    for name, leaf in arrays.items():
        other = leaf.astype(np.int32 if leaf.dtype == np.float32 else np.float32)
        changes = (None, leaf[:0], leaf[..., :-1] if leaf.ndim > 1 else leaf - 9, other, leaf[None], np.float64(0))
        for change in changes:
            changed = arrays | {name: change} if change is not None else {k: v for k, v in arrays.items() if k != name}
            changed = {name: np.ascontiguousarray(x) for name, x in changed.items()}
            safetensors.numpy.save_file(changed, tmp_path / "a", metadata=metadata)
            with pytest.raises(ValueError, match="a is damaged: ") as error:
                load_context(tmp_path / "a", model, params)
            assert "\n" not in str(error.value)
