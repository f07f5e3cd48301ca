"""Contexts in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from generating import assert_equal, assert_near, case, filled, row, unstacked
from small import forward

from rwkv_jax import interop
from rwkv_jax.generate import Context, load_context, save_context
from rwkv_jax.interop import pth, safetensors_file
from rwkv_jax.models.heads import LayerState

KINDS = pytest.mark.parametrize("kind", ["rwkv4", "rwkv7", "hybrid"])


@KINDS
def test_load_context_inverts_save_context_bit_exactly(kind, tmp_path):
    """Holds for any layout of the parameters and any length of the caches."""
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


@KINDS
def test_load_context_casts_to_the_dtype_of_the_model(kind, tmp_path):
    """A context saved in float32 loads in bfloat16; saved again, it loads unchanged."""
    model, params = unstacked(kind)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half = model.clone(dtype="bfloat16", param_dtype="bfloat16"), half
    context = filled(kind, 2)
    save_context(tmp_path / "a", context, model, params)
    found, _ = load_context(tmp_path / "a", *half)
    wanted = jax.eval_shape(lambda: half[0].init_state(2, max_length=256))
    for x, y, expected in zip(*map(jax.tree.leaves, (found.state, context.state, wanted)), strict=True):
        assert x.dtype == expected.dtype
        np.testing.assert_array_equal(x, y.astype(x.dtype))
    save_context(tmp_path / "b", found, *half)
    assert_equal(load_context(tmp_path / "b", *half)[0], found)


def test_load_context_refuses_numbers_beyond_the_range_of_the_dtype(tmp_path):
    model, params = unstacked("rwkv4")
    save_context(tmp_path / "a", filled("rwkv4", 1), model, params)
    arrays, metadata = safetensors_file.read(tmp_path / "a")
    arrays["logits_BV"] = np.full(arrays["logits_BV"].shape, 1e39)
    safetensors_file.write(tmp_path / "a", arrays, metadata)
    with pytest.raises(ValueError, match=r"a: logits_BV holds 1e\+39, and the largest float32 is 3\.4"):
        load_context(tmp_path / "a", model, params)


def test_load_context_refuses_a_context_of_another_model(tmp_path):
    model, params = unstacked("rwkv4")
    save_context(tmp_path / "a", filled("rwkv4", 1), model, params)
    other = jax.tree.map(lambda x: x, params)
    other["blocks_0"]["att"]["key"]["kernel"] = params["blocks_0"]["att"]["key"]["kernel"] * 1.01
    for wrong in ((model, other), unstacked("hybrid")):
        with pytest.raises(ValueError, match=r'a is the context of another model: .*"dim": 16'):
            load_context(tmp_path / "a", *wrong)
    with pytest.raises(ValueError, match="not one of this model"):
        save_context(tmp_path / "b", filled("hybrid", 1), model, params)
    assert not (tmp_path / "b").exists()


@KINDS
def test_load_context_refuses_a_damaged_file(kind, tmp_path):
    """Truncated anywhere, another file, or with an array missing, cut, or of another dtype or rank."""
    model, params = unstacked(kind)
    good, path = tmp_path / "good", tmp_path / "bad"
    save_context(good, filled(kind, 1), model, params, "text")
    content = good.read_bytes()

    def assert_refused(message):
        with pytest.raises(ValueError, match=message) as error:
            load_context(path, model, params)
        assert "\n" not in str(error.value)

    with pytest.raises(FileNotFoundError, match="bad: no such file"):
        load_context(path, model, params)
    cuts = [*range(0, 40, 5), *range(40, len(content), 5003), len(content) - 1]
    for damaged in (*(content[:cut] for cut in cuts), content + b"x", b"<html>" * 99):
        path.write_bytes(damaged)
        assert_refused(r"bad: (truncated|damaged)")
    safetensors.numpy.save_file({"a": np.zeros(2)}, path)
    assert_refused("bad is not a saved context, or one of another version")
    arrays = safetensors.numpy.load_file(good)
    with safetensors.safe_open(good, framework="np") as file:
        metadata = file.metadata()
    for name, leaf in arrays.items():
        is_float = leaf.dtype == np.float32
        changes = [leaf[:0], leaf[None], leaf.astype(np.int32 if is_float else np.float32)]
        changes += [leaf[..., :-1]] if is_float else [leaf - 9, leaf + 999]
        for changed in ({}, *({name: change} for change in changes)):
            rest = {other: array for other, array in arrays.items() if other != name}
            changed = {other: np.ascontiguousarray(array) for other, array in (rest | changed).items()}
            safetensors.numpy.save_file(changed, path, metadata)
            assert_refused("bad is damaged: ")


@pytest.mark.parametrize(
    "kind", ["rwkv7", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rwkv5", "rwkv6"))]
)
def test_load_context_reads_a_released_tuned_state_and_the_separator(kind, tmp_path, capsys):
    """The state is alone in its file, or stored with the weights."""
    model, params = unstacked(kind)
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.att.time_state": rng.standard_normal((1, 16, 16), np.float32) for i in range(2)}
    pth.write(tmp_path / "state.pth", tensors)
    pth.write(tmp_path / "both.pth", interop.to_official(params) | tensors)
    last = np.zeros((1, 16), np.float32)
    before = tuple(LayerState(last, x.transpose(0, 2, 1)[None], last) for x in tensors.values())
    logits_BTV, state = forward(model, params, np.zeros((1, 1), np.int32), before)
    for name in ("state.pth", "both.pth"):
        found, text = load_context(tmp_path / name, model, params)
        assert text is None
        assert_near(found, Context(state, logits_BTV[:, -1]))
    assert interop.load(tmp_path / "both.pth")[0].layers == (kind,)
    line = "both.pth holds tuned initial states, ignored here: load it as a context, too\n"
    assert capsys.readouterr().err == f"{tmp_path}/{line}"
    with pytest.raises(ValueError, match=r"state\.pth: tuned initial states, not weights"):
        interop.describe(tmp_path / "state.pth")
    pth.write(tmp_path / "other.pth", {name: x[:, :8] for name, x in tensors.items()})
    with pytest.raises(ValueError, match=r"other\.pth: 'blocks.0.att.time_state' has shape \(1, 8, 16\), expected"):
        load_context(tmp_path / "other.pth", model, params)
