"""A kind of layer unknown to the package, `running_sum`, works everywhere: one line registers it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running_sum
from judge import error_ratio
from small import drawn, forward, layer_norm, one_by_one, shapes_of, tokens
from training import DiedError, config, die_before, losses, numbers, same, write_text

import rwkv_jax
from rwkv_jax import evaluate, hardware, interop, models, train
from rwkv_jax.data.tokenizers import get_tokenizer
from rwkv_jax.models import stack, unstack
from rwkv_jax.train import optim

PROGRAMS = 90  # covers training, files and generation with one kind
B, T, D, L, V = 2, 6, 8, 4, 11
LAYERS = {"alone": ("sum",), "hybrid": ("attention", "sum")}


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.KINDS, "sum", running_sum.KIND)
        yield


def make(layers="alone", **fields):
    sizes = {"vocab_size": V, "dim": D, "num_layers": L, "head_size": 4, "matmul_precision": "highest"}
    return models.build("sum", layers=LAYERS[layers], **(sizes | fields))


def params_of(model):
    """The same numbers in either layout."""
    _, params = drawn(model.clone(scan=False), scale=0.3)
    stacked = jax.jit(stack, static_argnums=(1, 2))
    return jax.device_get(stacked(params, len(model.layers), model.layers_apart)) if model.scan else params


def in_numpy(params, ids, reset_BT, valid_BT):
    """Logits [B, T, V] of a model of running sums, in float64."""
    params = jax.tree.map(np.float64, params)
    x, first = layer_norm(params["emb"]["embedding"][ids], params["ln0"]), None
    for i in range(L):
        p = params[f"blocks_{i}"]
        h = layer_norm(x, p["ln"]) @ p["input"]["kernel"]
        first = h if first is None else first
        sums, s = np.zeros_like(h), np.zeros((B, D))
        for t in range(T):
            new = np.where(reset_BT[:, t, None], 0, p["sum_decay"] * s) + h[:, t]
            s = sums[:, t] = np.where(valid_BT[:, t, None], new, s)
        x = x + (sums + first) @ p["output"]["kernel"]
    return layer_norm(x, params["ln_out"]) @ params["head"]["kernel"]


@pytest.mark.parametrize("scan", [True, False])
def test_new_kind_passes_the_value_of_the_first_layer_to_all_later_ones(scan):
    rng = np.random.default_rng(0)
    model, ids, reset_BT, valid_BT = make(scan=scan), tokens(B, T), rng.random((B, T)) < 0.3, rng.random((B, T)) < 0.8
    params = params_of(model)
    logits_BTV, _ = forward(model, params, ids, None, reset_BT, valid_BT)
    expected = in_numpy(unstack(params), ids, reset_BT, valid_BT)
    assert error_ratio(np.asarray(logits_BTV)[valid_BT], expected[valid_BT]) < 1e-5


def test_new_kind_stores_the_layers_of_the_first_unit_separately():
    names = lambda layers: sorted(name for name in shapes_of(make(layers)) if name.startswith("blocks"))
    assert names("alone") == ["blocks", "blocks_0"]
    assert names("hybrid") == ["blocks", "blocks_0", "blocks_1"]
    assert sorted(shapes_of(make("hybrid", num_layers=2))) == ["blocks_0", "blocks_1", "emb", "head", "ln0", "ln_out"]
    assert jax.tree.leaves(shapes_of(make())["blocks"])[0].shape[0] == L - 1


@pytest.mark.parametrize("layers", LAYERS)
def test_new_kind_layouts_and_remat_agree_in_value_and_gradient(layers):
    model = make(layers)
    params = params_of(model)
    both = params, params_of(model.clone(scan=False))

    @jax.jit
    def gradients(stacked, apart):
        def loss(model):
            return lambda params: jnp.square(model.apply({"params": params}, tokens(B, T))[0]).sum()

        remat, unrolled = model.clone(remat="block"), model.clone(scan=False)
        return [*(jax.grad(loss(m))(stacked) for m in (model, remat)), jax.grad(loss(unrolled))(apart)]

    plain, remat, unrolled = map(jax.device_get, gradients(*both))
    assert jax.tree.all(jax.tree.map(lambda a, b: error_ratio(a, b) < 1e-5, plain, remat))
    assert jax.tree.all(jax.tree.map(lambda a, b: error_ratio(a, b) < 1e-5, unstack(plain), unrolled))


@pytest.mark.parametrize("layers", LAYERS)
def test_new_kind_state_carries_from_token_to_token(layers):
    model = make(layers)
    params, ids = params_of(model), tokens(B, T)
    whole, _ = forward(model, params, ids)
    steps, _ = one_by_one(model, params, ids, model.init_state(B, T))
    assert error_ratio(steps, whole) < 1e-5
    assert model.recurrent == (layers == "alone")


def test_new_kind_is_saved_and_loaded(tmp_path):
    for layers in LAYERS:
        model = make(layers, variant={"decayed": False})
        params = params_of(model)
        rwkv_jax.save(tmp_path / f"{layers}.safetensors", model, params)
        for scan in (True, False):
            again, read = rwkv_jax.load(tmp_path / f"{layers}.safetensors", scan=scan)
            assert again == model.clone(scan=scan) and again.variant == {"decayed": False}
            assert same(read, params if scan else unstack(params))
        with pytest.raises(ValueError, match=r"holds released models only, and this one has '(sum|attention)' layers"):
            rwkv_jax.save(tmp_path / "model.pth", model, params)
    assert interop.fingerprint(again, read) == interop.fingerprint(model, params)
    assert interop.fingerprint(make(layers), params) != interop.fingerprint(model, params)
    rounded = rwkv_jax.load(tmp_path / "alone.safetensors", dtype="bfloat16")[1]["blocks"]
    assert rounded["sum_decay"].dtype == "float32" and rounded["input"]["kernel"].dtype == "bfloat16"


def test_new_kind_generates_continues_and_streams():
    model = make(vocab_size=256)
    lm = rwkv_jax.RWKVForCausalLM(model, params_of(model), get_tokenizer("bytes"))
    text = lm.generate("ab", max_new_tokens=5, temperature=0)
    assert "".join(lm.stream("ab", max_new_tokens=5, temperature=0)) == text
    assert lm.generate("", max_new_tokens=5, temperature=0, context=lm.read("ab")) == text


def test_new_kind_record_is_read_by_hardware_and_optim():
    model = make("hybrid")
    attention = models.KINDS["attention"].flops(model.unit[0][2], T)
    assert hardware.flops_per_token(model, T) == 6 * V * D + 2 * (12 * D**2 + attention)
    assert optim.default_lr("sum", D) == 1e-2 and (r"/sum_decay$", 0.5) in optim.released_groups()
    assert optim.factors(shapes_of(model), optim.released_groups())["blocks_1"]["sum_decay"] == 0.5


def test_flops_per_token_and_default_lr_refuse_an_unknown_kind():
    model = make().clone(layers=("rum",))
    for look in (lambda: hardware.flops_per_token(model, T), lambda: optim.default_lr("rum", D)):
        with pytest.raises(ValueError, match="unknown kind of layer 'rum': did you mean 'sum'"):
            look()


@functools.cache
def trained(folder, strategy):
    its = config(write_text(folder / "text.txt"), strategy=strategy, eval_every=0, diagnostics_every=3)
    its.model.update(name="sum", num_layers=3)
    return train.run(its, folder / strategy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_new_kind_run_agrees_with_one_under_fsdp(folder):
    trained(folder, "single"), trained(folder, "fsdp")
    ours, theirs = losses(folder / "single"), losses(folder / "fsdp")
    assert ours.keys() == theirs.keys() and len(ours) == 6
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5)
    seen = [row["h_max"] for row in numbers(folder / "fsdp") if "h_max" in row]
    assert np.shape(seen) == (2, 3) and np.all(np.array(seen) > 0)


@pytest.mark.slow
def test_new_kind_run_resumes_bit_exactly_after_a_kill(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(DiedError):
        die_before(patch, lambda row: row.get("step") == 5)
        trained.__wrapped__(tmp_path, "single")
    assert same(trained.__wrapped__(tmp_path, "single").params, trained(folder, "single").params)
    assert numbers(tmp_path / "single") == numbers(folder / "single")


def test_new_kind_run_is_evaluated_by_windows(folder):
    trained(folder, "single")
    model, params = rwkv_jax.load(folder / "single")
    nll_N = evaluate.windows(model, params, np.arange(97, 161, dtype=np.uint8), 16, 4)
    assert model.layers == ("sum",) and np.isfinite(nll_N[1:]).all() and nll_N[1:].mean() < 7
