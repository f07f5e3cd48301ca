"""Contexts as values: rows, files, fingerprints and the cache of prefixes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from generating import KINDS, case, ids, unstacked
from judge import error_ratio

from rwkv_jax.generate import (
    PrefixCache,
    concatenate,
    fingerprint,
    generate,
    generate_with_context,
    load_context,
    read,
    rows,
    save_context,
)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# -------------------------------------------------------------------------------------------------- values


@KINDS
def test_a_fork_disturbs_nothing(kind):
    context = read(*unstacked(kind), ids(5))
    going = lambda more: generate_with_context(*unstacked(kind), more, context=context, max_new_tokens=40, seed=1)
    alone = going(ids(7, seed=4))
    other = going(ids(30, seed=5))
    again = going(ids(7, seed=4))
    assert alone[0] == again[0] != other[0]
    assert_equal(alone[1], again[1])
    assert_equal(context, read(*unstacked(kind), ids(5)))


@KINDS
def test_to_generate_nothing_is_to_read(kind):
    tokens, context = generate_with_context(*unstacked(kind), [ids(5)], max_new_tokens=0)
    assert tokens == [[]]
    assert error_ratio(context.logits_BV, read(*unstacked(kind), ids(5)).logits_BV) == 0


@KINDS
def test_rows_and_concatenate(kind):
    together = read(*unstacked(kind), [ids(n, seed=n) for n in (5, 9, 12)])
    for index, expected in ((1, [1]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 0, 0], [2, 0, 0])):
        picked = rows(together, index)
        np.testing.assert_array_equal(picked.logits_BV, together.logits_BV[np.array(expected)])
    assert_equal(concatenate([rows(together, b) for b in range(3)]), together)
    with pytest.raises(IndexError):
        rows(together, 3)
    with pytest.raises(ValueError, match="no contexts"):
        concatenate([])
    with pytest.raises(ValueError, match="different models"):
        concatenate([together, read(*unstacked("hybrid" if kind != "hybrid" else "rwkv4"), [1])])


@KINDS
def test_contexts_of_any_lengths_go_on_together(kind):
    long, short = read(*unstacked(kind), ids(300)), read(*unstacked(kind), ids(3))
    both = concatenate([short, long])
    tokens = generate(*unstacked(kind), [[], [1]], context=both, max_new_tokens=20, temperature=0)
    assert tokens[0] == generate(*unstacked(kind), ids(3), max_new_tokens=20, temperature=0)
    assert tokens[1] == generate(*unstacked(kind), [*ids(300), 1], max_new_tokens=20, temperature=0)


# -------------------------------------------------------------------------------------------------- files


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_holds_a_context(kind, dtype, tmp_path):
    model, params = unstacked(kind)
    model = model.clone(dtype=dtype)
    context = read(model, params, [ids(5), ids(300)])
    save_context(tmp_path / "a.context", context, model, params, text="é\n日")
    assert [path.name for path in tmp_path.iterdir()] == ["a.context"]
    found, text = load_context(tmp_path / "a.context", *case(kind)) if dtype == "float32" else (None, "é\n日")
    assert text == "é\n日"
    if found is not None:
        assert_equal(found, context)
    found, text = load_context(tmp_path / "a.context", model, params)
    assert_equal(found, context)
    settings = {"max_new_tokens": 20, "seed": 3}
    expected = generate(model, params, [[], []], context=context, **settings)
    assert generate(model, params, [[], []], context=found, **settings) == expected
    save_context(tmp_path / "a.context", rows(context, 0), model, params)
    found, text = load_context(tmp_path / "a.context", model, params)
    assert text is None
    assert_equal(found, rows(context, 0))


def test_a_context_serves_the_model_in_another_dtype(tmp_path):
    model, params = unstacked("hybrid")
    save_context(tmp_path / "a", read(model, params, ids(5)), model, params)
    half = model.clone(dtype="bfloat16", param_dtype="bfloat16"), jax.tree.map(lambda x: jnp.bfloat16(x), params)
    found, _ = load_context(tmp_path / "a", *half)
    assert error_ratio(read(*half, [1], found).logits_BV, read(model, params, [*ids(5), 1]).logits_BV) < 0.1


def test_another_models_context_is_refused(tmp_path):
    model, params = unstacked("rwkv4")
    save_context(tmp_path / "a", read(model, params, ids(5)), model, params)
    other = jax.tree.map(lambda x: x, params)
    other["blocks_0"]["att"]["key"]["kernel"] = params["blocks_0"]["att"]["key"]["kernel"] * 1.01
    for wrong in ((model, other), unstacked("hybrid")):
        with pytest.raises(ValueError, match="a is the context of another model") as error:
            load_context(tmp_path / "a", *wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not one of this model"):
        save_context(tmp_path / "b", read(*unstacked("hybrid"), [1]), model, params)
    assert not (tmp_path / "b").exists()


@KINDS
def test_a_damaged_file_is_refused(kind, tmp_path):
    model, params = unstacked(kind)
    save_context(tmp_path / "good", read(model, params, ids(5)), model, params, "text")
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


@KINDS
def test_a_file_of_other_arrays_is_refused(kind, tmp_path):
    model, params = unstacked(kind)
    save_context(tmp_path / "a", read(model, params, ids(5)), model, params)
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


# -------------------------------------------------------------------------------------------------- fingerprints


@KINDS
def test_a_fingerprint_knows_neither_layout_nor_dtype(kind):
    model, params = case(kind)
    expected = fingerprint(model, params)
    assert fingerprint(*unstacked(kind)) == expected == fingerprint(model, jax.tree.map(jnp.asarray, params))
    half = jax.tree.map(lambda x: jnp.bfloat16(x), params)
    assert fingerprint(model.clone(dtype="bfloat16", param_dtype="bfloat16"), half) == expected


@KINDS
def test_a_fingerprint_tells_models_apart(kind):
    model, params = unstacked(kind)
    seen = {fingerprint(model, params)}
    leaves, tree = jax.tree.flatten(params)
    for i in range(len(leaves)):
        changed = [x * 1.02 if j == i else x for j, x in enumerate(leaves)]
        seen.add(fingerprint(model, jax.tree.unflatten(tree, changed)))
    if "attention" in model.layers:
        seen.add(fingerprint(model.clone(head_size=4), params))
    assert len(seen) == 1 + len(leaves) + ("attention" in model.layers)


# -------------------------------------------------------------------------------------------------- prefixes


@KINDS
def test_a_prefix_is_read_once(kind, monkeypatch):
    cache, seen = PrefixCache(*case(kind)), []
    from rwkv_jax.generate import decode

    def counted(model, params, context, prompts):
        seen.append(len(prompts[0]))
        return read_on(model, params, context, prompts)

    read_on = decode.read_on
    monkeypatch.setattr(decode, "read_on", counted)
    text = ids(300)
    for length, more in ((100, 100), (90, 90), (100, None), (300, 200), (120, 20)):
        context = cache.read(text[:length])
        assert seen == ([more] if more else [])
        seen.clear()
        expected = read(*unstacked(kind), text[:length])
        seen.clear()
        assert error_ratio(context.logits_BV, expected.logits_BV) < 1e-5
    cache.read([*text[:99], 255 - text[99]])  # begins with the 90, not with the 100
    assert seen == [10]
    with pytest.raises(ValueError, match="no tokens"):
        cache.read([])


def test_the_prefix_not_used_for_longest_goes():
    cache = PrefixCache(*unstacked("rwkv4"), max_entries=2)
    first = cache.read([1, 2])
    cache.read([3])
    assert cache.read([1, 2]) is first
    cache.read([4])  # in place of [3]
    assert len(cache) == 2 and cache.read([1, 2]) is first
    cache.read([5])
    cache.read([6])
    assert len(cache) == 2 and cache.read([1, 2]) is not first
    with pytest.raises(ValueError, match="max_entries is 0"):
        PrefixCache(*unstacked("rwkv4"), max_entries=0)
