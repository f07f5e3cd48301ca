"""Fine-tuning runs: trained parameters, loading, export, merge and resume, and mistakes."""

import functools
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small
import training

import rwkv_jax
from rwkv_jax import checkpoint, finetune, generate, train
from rwkv_jax.data import tokenizers
from rwkv_jax.interop import pth
from rwkv_jax.models import lora
from rwkv_jax.train import assemble, methods, run_config
from rwkv_jax.train.methods import Method

ROOT = Path(__file__).parents[1]
PROGRAMS = 60  # fingerprints of weights, and every shape in a file
STEPS = 4
V, D, L = 256, 8, 2
LORA = Method("lora", 2, 4.0, "att/(key|output)|head")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model, params, path of their file)."""
    model, params = small.drawn(rwkv_jax.build("rwkv4", vocab_size=V, num_layers=L, dim=D), scale=0.2)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    rwkv_jax.save(path, model, params)
    return model, params, str(path)


def _config(base, text, method, **changes):
    config = run_config.read(str(ROOT / "configs" / f"finetune.py:{method}"))
    config.update(corpus=text, steps=STEPS, seq_len=16, batch_size=4, log_every=1, eval_every=0, eval_tokens=128)
    config.update(save_every=2, **changes)
    config.finetune.update(model=base[2], rank=2, targets=LORA.targets, alpha=LORA.alpha)
    config.optim.lr = 1e-2
    return config


@pytest.fixture(scope="module")
def runs(base, text, tmp_path_factory):
    """A function that gives (workdir, final state) of a run by method, trained at its first call."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(method):
        return folder / method, train.run(_config(base, text, method), folder / method)

    return run


def test_lora_run_trains_its_adapters_alone(runs, base):
    workdir, state = runs("lora")
    assert training.same(state.frozen, base[1])
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state.params)
    }
    kernels = ("blocks/att/key", "blocks/att/output", "head")
    assert paths == {f"{kernel}/lora_{x}" for kernel in kernels for x in "ab"}
    final = jax.device_get(state.params)
    _, before = checkpoint.restore(workdir / "checkpoints", jax.eval_shape(lambda: final), 2, key="params")
    assert all(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (final, before)), strict=True))
    assert not any("frozen" in str(path) for path in workdir.rglob("*"))


def test_lora_run_loads_with_adapters_merged(runs, base):
    workdir, state = runs("lora")
    _, params = rwkv_jax.load(workdir)
    assert training.same(params, lora.merge(jax.device_put(base[1]), state.params, LORA.alpha))


def test_finetune_export_and_merge_of_a_lora_run_equal_loading_it(runs, base, tmp_path, capsys):
    workdir, _ = runs("lora")
    adapters, merged = str(tmp_path / "adapters.safetensors"), str(tmp_path / "merged.safetensors")
    assert finetune.main(["export", str(workdir), adapters]) == 0
    assert finetune.main(["merge", base[2], adapters, merged]) == 0
    written = re.findall("^wrote (.*), [0-9,]+ bytes$", capsys.readouterr().err, re.MULTILINE)
    assert written == [adapters, merged]
    assert training.same(rwkv_jax.load(merged)[1], rwkv_jax.load(workdir)[1])

    folder = tmp_path / "folder"
    assert finetune.main(["merge", base[2], adapters, str(folder)]) == 0
    assert training.same(rwkv_jax.load(folder)[1], rwkv_jax.load(workdir)[1])
    assert tokenizers.carried(folder) == str(folder / "tokenizer.json")
    assert finetune.main(["export", str(workdir), str(tmp_path / "adapters.pth")]) == 2
    assert capsys.readouterr().err.endswith(
        "adapters.pth: adapters are written as .safetensors only, expected that suffix\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])
def test_lora_run_on_a_later_version_loads_with_adapters_merged(kind, text, tmp_path):
    model, params = small.drawn(rwkv_jax.build(kind, vocab_size=V, num_layers=3, dim=16, head_size=8), scale=0.2)
    rwkv_jax.save(tmp_path / "base.pth", model, params)
    state = train.run(_config((model, params, str(tmp_path / "base.pth")), text, "lora"), tmp_path / "run")
    assert training.same(state.frozen, params)
    assert all(np.any(x) for x in jax.tree.leaves(state.params))
    _, merged = rwkv_jax.load(tmp_path / "run")
    assert training.same(merged, lora.merge(jax.device_put(params), state.params, LORA.alpha))


@pytest.mark.slow
def test_state_run_trains_the_state_alone(runs, base):
    workdir, state = runs("state")
    assert training.same(state.frozen, base[1]) and training.same(rwkv_jax.load(workdir)[1], base[1])
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 4 * L * D
    untuned = methods.untuned_state(base[0])
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(np.any(x != y)), state.params, untuned))


@pytest.mark.slow
def test_finetune_export_of_a_state_run_is_a_context_for_generate(runs, base, tmp_path):
    workdir, state = runs("state")
    model, params, _ = base
    path = tmp_path / "tuned.context"
    assert finetune.main(["export", str(workdir), str(path)]) == 0
    context, text = generate.load_context(path, model, params)
    assert text is None and training.same(context, finetune.tuned_context(model, params, state.params))
    ids = generate.generate(model, params, [[65, 66]], context=context, max_new_tokens=3, temperature=0)
    logits_BTV, _ = small.forward(model, params, np.array([[65, 66, *ids[0][:2]]]), context.state)
    assert ids[0] == np.asarray(logits_BTV)[0, 1:].argmax(-1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rwkv5", "rwkv6", "rwkv7"])
def test_finetune_export_of_a_state_run_writes_a_released_file(kind, text, tmp_path):
    """Both exported forms give the same context; the released one holds value-major matrices alone."""
    model, params = small.drawn(rwkv_jax.build(kind, vocab_size=V, num_layers=L, dim=D, head_size=4), scale=0.2)
    rwkv_jax.save(tmp_path / "base.pth", model, params)
    base = model, params, str(tmp_path / "base.pth")
    state = train.run(_config(base, text, "state"), tmp_path / "run")
    assert training.same(state.frozen, params)
    wkv_LHKV = np.asarray(state.params["blocks"]["wkv"])
    assert all(np.any(wkv_HKV) for wkv_HKV in wkv_LHKV)
    for name in ("tuned.pth", "tuned.context"):
        assert finetune.main(["export", str(tmp_path / "run"), str(tmp_path / name)]) == 0
    tensors = pth.read(tmp_path / "tuned.pth")
    assert list(tensors) == [f"blocks.{i}.att.time_state" for i in range(L)]
    for x, wkv_HKV in zip(tensors.values(), wkv_LHKV, strict=True):
        np.testing.assert_array_equal(x, wkv_HKV.transpose(0, 2, 1))
    released, ours = (
        generate.load_context(tmp_path / name, model, params)[0] for name in ("tuned.pth", "tuned.context")
    )
    assert training.same(released, ours)


@pytest.mark.slow
def test_finetune_export_refuses_a_released_file_of_an_rwkv4_state(runs, tmp_path, capsys):
    workdir, _ = runs("state")
    capsys.readouterr()
    assert finetune.main(["export", str(workdir), str(tmp_path / "tuned.pth")]) == 2
    assert capsys.readouterr().err.startswith("error: no released form of a tuned state that has att_last")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_run_with_frozen_groups_keeps_them_bit_equal(base, text, tmp_path):
    config = _config(base, text, "full", strategy="fsdp")
    groups = ((r"^emb/", 0.0), (r"blocks.0/", 0.0), (r"blocks.1/att", 0.5), (r"time_decay$", 2.0))
    config.optim.update(groups=groups, weight_decay=0.1)
    state = train.run(config, tmp_path / "run")
    moved = jax.tree.map(lambda x, y: np.asarray(x != y), state.params, base[1])
    assert not moved["emb"]["embedding"].any()
    for x in jax.tree.leaves(moved["blocks"]):
        assert not x[0].any() and x[1].any()
    assert moved["head"]["kernel"].any()
    shapes = [x.shape for x in jax.tree.leaves(state.opt_state)]
    assert shapes.count((V, D)) == 0 and shapes.count((D, V)) == 2, "moments of a frozen leaf"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "state"])
@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_strategies_agree_on_finetuning(strategy, method, runs, base, text, tmp_path):
    config = _config(base, text, method, strategy=strategy)
    state = train.run(config, tmp_path / "run")
    difference = jax.tree.map(lambda x, y: np.abs(x - np.asarray(y)).max(), runs(method)[1].params, state.params)
    assert max(jax.tree.leaves(difference)) < 1e-4


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("full", "state"))])
def test_finetuning_resumes_bit_exactly(method, runs, base, text, tmp_path):
    config = _config(base, text, method)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(training.DiedError):
        training.die_before(patch, lambda row: row["step"] == 4)
        train.run(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    state = train.run(config, tmp_path / "run")
    assert training.same(state, runs(method)[1])


def test_finetuning_refuses_to_resume_on_other_weights(runs, base, text, tmp_path):
    model, params, path = base
    workdir, _ = runs("lora")
    shutil.copy(path, tmp_path / "kept")
    try:
        rwkv_jax.save(path, model, params | {"head": jax.tree.map(np.negative, params["head"])})
        with pytest.raises(ValueError, match="a run on other weights"):
            train.run(_config(base, text, "lora"), workdir)
        with pytest.raises(ValueError, match="trained on other weights"):
            rwkv_jax.load(workdir)
        Path(path).unlink()
        with pytest.raises(ValueError, match=r"needs the weights that it was trained on: .*base\.pth"):
            rwkv_jax.load(workdir)
    finally:
        shutil.copy(tmp_path / "kept", path)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"model.vocab_size": 300}, "model.vocab_size is 300, expected 256 as in "),
        ({"finetune.model": ""}, "finetune.method is 'lora', which needs finetune.model"),
        ({"finetune.model": "/nowhere.pth"}, "/nowhere.pth: no such file or folder"),
    ],
)
def test_assembled_names_fields_that_do_not_fit_the_weights(fields, expected, base, text, tmp_path):
    config = _config(base, text, "lora", tokenizer="bytes")
    config.update_from_flattened_dict(fields)
    with pytest.raises((ValueError, OSError)) as raised:
        assemble.assembled(config, tmp_path / "run")
    assert expected in str(raised.value)


@pytest.mark.slow
def test_finetuning_refuses_another_tokenizer_than_the_bases(runs, base, text, tmp_path):
    config = _config(base, text, "lora", tokenizer="characters")
    config.finetune.model = str(runs("full")[0])
    with pytest.raises(ValueError, match=r"tokenizer is 'characters', expected 'bytes' as in .*full$"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_finetune_export_refuses_a_full_run(runs, tmp_path, capsys):
    assert finetune.main(["export", str(runs("full")[0]), str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())
