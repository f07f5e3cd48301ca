"""Fine-tuning as a researcher relies on it: what is trained, what stays, what comes out, resumed and mistaken."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import rwkv_jax
from rwkv_jax import checkpoint, finetune, generate, metrics, optim, run_config, train
from rwkv_jax.finetune import Method
from rwkv_jax.models import lora
from rwkv_jax.train import TrainState
from rwkv_jax.train.__main__ import main

ROOT = Path(__file__).parents[1]
STEPS = 4
V, D, L = 256, 16, 2
LORA = Method("lora", 2, 4.0, "att/(key|output)|head")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("RWKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    rng = np.random.default_rng(0)
    path.write_bytes(rng.choice(np.frombuffer(b"abc def\n", np.uint8), 20_000).tobytes())
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model, params) and their file."""
    model, params = small.drawn(rwkv_jax.build("rwkv4", vocab_size=V, num_layers=L, dim=D), scale=0.2)
    params = jax.tree.map(jnp.asarray, params)
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
    """A run by a method, when it is first asked for: workdir and final state."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(method):
        return folder / method, train.run(_config(base, text, method), folder / method)

    return run


def _same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b)))


def _tuned(seed=0):
    """Adapters and a state that do something."""
    rng = np.random.default_rng(seed)
    return lambda tree: jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), tree)


def _adapters(model, params, method=LORA):
    return _tuned()(method.split(model, params, jax.random.key(0))[0])


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    "kind", ["rwkv4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("transformer", "hybrid"))]
)
def test_adapters_change_nothing_at_first_and_merge_into_the_weights(kind):
    model, params = small.made(kind)
    method = Method("lora", 2, 6.0, "key|value|(q|k|v|out|up|down)/kernel|head")
    tokens_BT = small.tokens(2, 9)
    plain_BTV, _ = small.forward(model, params, tokens_BT)
    fresh, frozen = method.split(model, params, jax.random.key(0))
    assert _same(small.forward(model, method.bind(fresh, frozen, 2)[0], tokens_BT)[0], plain_BTV)
    adapters = _adapters(model, params, method)
    joined_BTV, _ = small.forward(model, method.bind(adapters, frozen, 2)[0], tokens_BT)
    merged = lora.merge(jax.tree.map(jnp.asarray, params), adapters, method.alpha)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(joined_BTV, small.forward(model, merged, tokens_BT)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(joined_BTV - plain_BTV).max() > 0.1


def test_a_merged_matrix_is_the_formula(base):
    model, params, _ = base
    adapters = _adapters(model, params)
    merged = lora.merge(params, adapters, 4.0)
    pair = jax.tree.map(lambda x: np.asarray(x, np.float64), adapters["blocks"]["att"]["key"])
    expected = params["blocks"]["att"]["key"]["kernel"] + 4.0 / 2 * pair["lora_a"] @ pair["lora_b"]
    np.testing.assert_allclose(merged["blocks"]["att"]["key"]["kernel"], expected, rtol=1e-6, atol=1e-7)
    assert _same(merged["blocks"]["ffn"], params["blocks"]["ffn"])


def test_lora_trains_a_and_b_of_its_targets_alone(runs, base):
    workdir, state = runs("lora")
    assert _same(state.frozen, base[1])
    paths = {"/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    kernels = ("blocks/att/key", "blocks/att/output", "head")
    assert paths == {f"{kernel}/lora_{x}" for kernel in kernels for x in "ab"}
    fresh = LORA.split(base[0], base[1], jax.random.key(0))[0]
    assert all(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (state.params, fresh)), strict=True))
    saved = sum(file.stat().st_size for file in (workdir / "checkpoints").rglob("*") if file.is_file())
    assert "frozen" not in json.dumps([str(f) for f in workdir.rglob("*")]) and saved > 0


def test_a_lora_run_is_loaded_merged_in_both_layouts(runs, base):
    workdir, state = runs("lora")
    model, params = rwkv_jax.load(workdir)
    assert _same(params, lora.merge(base[1], state.params, LORA.alpha))
    _, layers = rwkv_jax.load(workdir, scan=False)
    assert _same(layers, rwkv_jax.unstack(params))
    assert jnp.bfloat16 == rwkv_jax.load(workdir, dtype="bfloat16")[1]["head"]["kernel"].dtype
    tokens_BT = np.arange(12)[None]
    merged_BTV = small.forward(model, params, tokens_BT)[0]
    joined_BTV = small.forward(model, LORA.bind(state.params, state.frozen, 1)[0], tokens_BT)[0]
    np.testing.assert_allclose(merged_BTV, joined_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["m.pth", "m.safetensors", "m", "m.bin"])
def test_adapters_round_trip_through_every_format(target, runs, base, tmp_path):
    """exported, merged into the base's file by the command, written and read again."""
    workdir, _ = runs("lora")
    assert finetune.main(["export", str(workdir), str(tmp_path / "adapters.safetensors")]) == 0
    if target == "m.bin":
        model, params = rwkv_jax.load(workdir)
        rwkv_jax.save(tmp_path / target, model, params, format="rwkv.cpp")
    else:
        assert finetune.main(["merge", base[2], str(tmp_path / "adapters.safetensors"), str(tmp_path / target)]) == 0
    assert _same(rwkv_jax.load(tmp_path / target)[1], rwkv_jax.load(workdir)[1])


def test_adapters_know_their_model(base, tmp_path):
    model, params, _ = base
    adapters, path = _adapters(model, params), tmp_path / "a.safetensors"
    finetune.save_adapters(path, model, params, adapters, 3.0)
    found, alpha = finetune.load_adapters(path, model, params)
    assert alpha == 3.0 and _same(found, adapters)
    other = params | {"head": jax.tree.map(lambda x: x + 1, params["head"])}
    with pytest.raises(ValueError, match="holds the adapters of another model"):
        finetune.load_adapters(path, model, other)


# -------------------------------------------------------------------------------------------------------- state tuning


def test_a_tuned_state_has_a_gradient_where_the_empty_one_has_none(base):
    model, params, _ = base
    tokens_BT = np.arange(8)[None]

    @jax.jit
    @jax.grad
    def of_tuned(tuned):
        return model.apply({"params": params}, tokens_BT, finetune.tuned_state(tuned, 1))[0].std()

    @jax.jit
    @jax.grad
    def of_empty(wkv):
        state = tuple(entry._replace(wkv=w) for entry, w in zip(model.init_state(1), wkv, strict=True))
        return model.apply({"params": params}, tokens_BT, state)[0].std()

    grads = of_tuned(finetune.untuned_state(model))["blocks"]
    # at value 0 the first factor of d/d(log den) is the average itself, at which a token's own share is aimed
    assert all(np.count_nonzero(grads[name]) == L * D for name in ("att_last", "value", "log_den", "ffn_last"))
    empty = of_empty(tuple(entry.wkv for entry in model.init_state(1)))
    assert not any(np.any(x) for x in jax.tree.leaves(empty))


@pytest.mark.slow
def test_state_tuning_trains_the_state_alone(runs, base):
    workdir, state = runs("state")
    assert _same(state.frozen, base[1]) and _same(rwkv_jax.load(workdir)[1], base[1])
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 4 * L * D
    untuned = finetune.untuned_state(base[0])
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(np.any(x != y)), state.params, untuned))


@pytest.mark.slow
def test_a_tuned_state_is_a_context(runs, base, tmp_path):
    workdir, state = runs("state")
    model, params, _ = base
    path = tmp_path / "tuned.context"
    assert finetune.main(["export", str(workdir), str(path)]) == 0
    context, text = generate.load_context(path, model, params)
    assert text is None and _same(context, finetune.tuned_context(model, params, state.params))
    # after the separator, as by hand
    logits_BTV, after = small.forward(model, params, np.zeros((1, 1), np.int32), finetune.tuned_state(state.params, 1))
    np.testing.assert_allclose(context.logits_BV, logits_BTV[:, -1], rtol=1e-5, atol=1e-5)
    ids = generate.generate(model, params, [[65, 66]], context=context, max_new_tokens=3, temperature=0)
    logits_BTV, _ = small.forward(model, params, np.array([[65, 66, *ids[0][:2]]]), after)
    assert ids[0] == logits_BTV[0, 1:].argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------- freezing and groups


FREEZE = ((r"^emb/", 0.0), (r"blocks.0/", 0.0), (r"blocks.1/att", 0.5), (r"time_decay$", 2.0))


def test_factors_of_leaves_and_of_layers():
    _, params = small.made("rwkv4", num_layers=12)
    rules = [(r"^emb", 0), (r"blocks\.2-10/att", 0.5), (r"blocks.1/", 0.0), (r"ffn/", 3.0)]
    factors = optim.factors(params, rules)
    assert factors["emb"]["embedding"] == 0 and factors["head"]["kernel"] == 1
    att = factors["blocks"]["att"]["key"]["kernel"]
    assert att.shape == (12, 1, 1) and att.ravel().tolist() == [1, 0, *[0.5] * 9, 1]
    assert factors["blocks"]["ffn"]["key"]["kernel"].ravel().tolist() == [3, 0, *[3] * 10]
    layers = optim.factors(rwkv_jax.unstack(params), rules)
    assert [layers[f"blocks_{i}"]["att"]["key"]["kernel"] for i in range(12)] == att.ravel().tolist()
    assert optim.factors(params, optim.GROUPS)["blocks"]["att"]["time_first"] == 3.0


def test_a_frozen_part_is_not_moved_by_decay_and_has_no_moments():
    params = {"emb": {"embedding": jnp.ones((3, 2))}, "blocks": {"att": {"key": {"kernel": jnp.ones((2, 2, 2))}}}}
    tx = optim.optimiser(weight_decay=0.1, groups=((r"^emb/", 0.0), (r"blocks.0/", 0.0)))
    state = TrainState(jnp.zeros(()), params, tx.init(params), jnp.zeros(()))
    after, _ = train.apply_gradient(tx, state, jax.tree.map(jnp.ones_like, params), jnp.ones(()), 0.5)
    moved = jax.tree.map(lambda x, y: np.asarray(x != y), after.params, params)
    assert not moved["emb"]["embedding"].any()
    assert moved["blocks"]["att"]["key"]["kernel"].all(axis=(1, 2)).tolist() == [False, True]
    assert sum(x.size for x in jax.tree.leaves(after.opt_state)) == 1 + 2 * 8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "pmap", "fsdp"])
def test_what_is_frozen_keeps_its_bits(strategy, base, text, tmp_path):
    config = _config(base, text, "full", strategy=strategy)
    config.optim.update(groups=FREEZE, weight_decay=0.1)
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
def test_the_strategies_agree(strategy, method, runs, base, text, tmp_path):
    config = _config(base, text, method, strategy=strategy)
    state = train.run(config, tmp_path / "run")
    difference = jax.tree.map(lambda x, y: np.abs(x - np.asarray(y)).max(), runs(method)[1].params, state.params)
    assert max(jax.tree.leaves(difference)) < 1e-4


# -------------------------------------------------------------------------------------------------------------- resume


class _DiedError(Exception):
    pass


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("full", "state"))])
def test_resume_is_bit_for_bit(method, runs, base, text, tmp_path, monkeypatch):
    append = metrics.append

    def dies(path, row):
        append(path, row)
        if row["step"] == 3:
            raise _DiedError

    monkeypatch.setattr(metrics, "append", dies)
    with pytest.raises(_DiedError):
        train.run(_config(base, text, method), tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    state = train.run(_config(base, text, method), tmp_path / "run")
    assert _same(state, runs(method)[1])


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(runs, base, text, tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "rwkv_jax.train", f"--config={ROOT}/configs/finetune.py:lora"]
    command += [f"--workdir={workdir}", f"--config.corpus={text}", "--config.steps=400", "--config.seq_len=16"]
    command += ["--config.batch_size=4", "--config.save_every=2", f"--config.finetune.model={base[2]}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.steps(workdir / "checkpoints") and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < checkpoint.steps(workdir / "checkpoints")[-1] < 400
    whole = [c.replace(str(workdir), str(tmp_path / "whole")) for c in command]
    for c in (command, whole):
        subprocess.run(c, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert _same(*(rwkv_jax.load(tmp_path / name)[1] for name in ("run", "whole")))


def test_a_run_does_not_go_on_upon_other_weights(base, text, tmp_path):
    model, params, _ = base
    rwkv_jax.save(tmp_path / "base.pth", model, params)
    config = _config(base, text, "lora")
    config.finetune.model = str(tmp_path / "base.pth")
    train.run(config, tmp_path / "run")
    rwkv_jax.save(tmp_path / "base.pth", model, params | {"head": jax.tree.map(jnp.negative, params["head"])})
    with pytest.raises(ValueError, match="a run on other weights"):
        train.run(config, tmp_path / "run")
    with pytest.raises(ValueError, match="trained on other weights"):
        rwkv_jax.load(tmp_path / "run")
    (tmp_path / "base.pth").unlink()
    with pytest.raises(ValueError, match=r"needs the weights that it was trained on: .*base\.pth"):
        rwkv_jax.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--config.finetune.targets=attention"], "LoRA targets 'attention' match no kernel, expected some of blocks"),
        (["--config.finetune.rank=0"], "config field finetune.rank is 0, expected 1 or more"),
        (["--config.finetune.method=adapter"], "finetune.method is 'adapter', expected full, lora or state"),
        (["--config.finetune.targets=("], "config field finetune.targets is '('"),
        (["--config.optim.groups=(('atr', 0.0),)"], "optim.groups: 'atr' matches none of blocks/att/key/lora_a"),
        (["--config.model.vocab_size=300"], "model.vocab_size is 300, and 256 in "),
        (["--config.model.num_layers=3"], "model.num_layers is 3, and 2 in "),
        (["--config.finetune.model="], "finetune.method is 'lora', which needs finetune.model"),
        (["--config.finetune.model=/nowhere.pth"], "/nowhere.pth: no such file or folder"),
        pytest.param(
            ["--config.tokenizer=world"],
            "model.vocab_size is 256, expected at least 65536",
            marks=pytest.mark.skipif(not find_spec("pyrwkv_tokenizer"), reason="the World tokenizer is an extra"),
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, expected, base, text, tmp_path, capsys):
    command = [f"--config={ROOT}/configs/finetune.py:lora", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.corpus={text}", f"--config.finetune.model={base[2]}", *flags]
    assert main(command) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_tokenizer_than_the_models_own_is_one_line(runs, base, text, tmp_path):
    config = _config(base, text, "lora", tokenizer="characters")
    config.finetune.model = str(runs("full")[0])
    with pytest.raises(ValueError, match=r"tokenizer is 'characters', and .*full comes with another: 'bytes'"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_files_of_something_else_are_one_line(runs, base, tmp_path, capsys):
    assert finetune.main(["export", str(runs("full")[0]), str(tmp_path / "x")]) == 2
    assert finetune.main(["merge", base[2], base[2], str(tmp_path / "x.pth")]) == 2
    assert finetune.main(["merge", base[2], str(tmp_path / "none"), str(tmp_path / "x.pth")]) == 2
    assert finetune.main(["export", str(tmp_path), str(tmp_path / "x")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines if "guessed" not in line] == [True] * 4
    assert not list(tmp_path.iterdir())


def test_attention_has_no_state_to_tune():
    with pytest.raises(ValueError, match="expected RWKV layers alone"):
        Method("state").check(small.make("hybrid"))
