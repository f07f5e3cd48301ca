"""State carried over segments and steps: gradients by hand, every strategy, and a run that resumes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from small import V, drawn, forward, make

from rwkv_jax import checkpoint, models, optim, parallel, run_config, train
from rwkv_jax.train.step import TrainState, make_gradient

B, T, K = 8, 12, 3  # segments of 4


@pytest.fixture(scope="module")
def rwkv4():
    """(model, params) that remember, so that a gradient over a border is not lost in rounding."""
    return drawn(make("rwkv4"))


def _batch(seed=0, reset=0.1):
    rng = np.random.default_rng(seed)
    share_B1 = np.linspace(0.2, 1, B)[:, None]
    return {
        "tokens": rng.integers(0, V, (B, T + 1)).astype(np.int32),
        "mask": rng.random((B, T)) < share_B1,
        "reset": rng.random((B, T)) < reset,
    }


def _state(params, carry=None):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, (), zero, carry=carry)


def _carry(model, params):
    return jax.device_get(forward(model, params, _batch(9)["tokens"])[1])


@functools.cache
def _program(model, **options):
    return jax.jit(make_gradient(model, l2wrap=False, **options))


def _gradient(model, params, carry=None, batch=None, **options):
    return jax.device_get(_program(model, **options)(_state(params, carry), batch or _batch()))


def _by_hand(model, params, state, batch):
    """Gradient, loss and end of a plain Python loop over segments, each with a gradient of its own."""

    def loss(params, tokens_BT, targets_BT, mask_BT, reset_BT, state):
        logits_BTV, state = model.apply({"params": params}, tokens_BT, state, reset_BT=reset_BT)
        return jnp.where(mask_BT, optim.cross_entropy(logits_BTV, targets_BT), 0).sum(), state

    gradient, sums = jax.jit(jax.value_and_grad(loss, has_aux=True)), []
    rows = batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["mask"], batch["reset"]
    for i in range(0, T, T // K):
        (value, state), grads = gradient(params, *(x[:, i : i + T // K] for x in rows), state)
        sums.append((grads, value))
    grads, value = jax.tree.map(lambda *x: sum(x) / batch["mask"].sum(), *sums)
    return jax.device_get((grads, value, state))


def _assert_close(actual, expected, bound=1e-5):
    errors = jax.tree.map(error_ratio, actual, expected)
    assert max(jax.tree.leaves(errors)) < bound, errors


@pytest.mark.parametrize("carried", [False, True])
def test_without_the_stop_segments_are_full_back_propagation(carried, rwkv4):
    model, params = rwkv4
    carry = _carry(model, params) if carried else None
    segments, whole = _gradient(model, params, carry, segments=K), _gradient(model, params, carry)
    _assert_close(segments, whole)
    assert (segments[2] is None) == (whole[2] is None) == (not carried)


def test_with_the_stop_they_are_the_loop_by_hand(rwkv4):
    model, params = rwkv4
    carry = _carry(model, params)
    grads, loss, end = _gradient(model, params, carry, segments=K, stop_gradient=True)
    _assert_close((grads, loss, end), _by_hand(model, params, carry, _batch()))
    whole = _gradient(model, params, carry)
    assert error_ratio(loss, whole[1]) < 1e-6  # the same forward pass
    assert max(jax.tree.leaves(jax.tree.map(error_ratio, grads, whole[0]))) > 1e-2  # another gradient


def test_a_carry_is_where_rows_go_on_and_a_reset_forgets_it(rwkv4):
    """Two steps of T with the state handed on are one of 2·T; a reset of a row's first token drops its past alone."""
    model, params = rwkv4
    first, second = _batch(1), _batch(2)
    second["tokens"][:, 0] = first["tokens"][:, -1]
    tokens = np.concatenate([first["tokens"][:, :-1], second["tokens"]], axis=1)
    _, _, end = _gradient(model, params, model.init_state(B), first)
    _, loss, _ = _gradient(model, params, end, second)
    resets = np.concatenate([first["reset"], second["reset"]], axis=1)
    logits_BTV = forward(model, params, tokens[:, :-1], None, resets)[0][:, T:]
    nll_BT = optim.cross_entropy(logits_BTV, second["tokens"][:, 1:])
    assert loss == pytest.approx(float(nll_BT[second["mask"]].mean()), rel=1e-6)

    fresh = second | {"reset": second["reset"].copy()}
    fresh["reset"][:, 0] = True
    with_past, without = (_gradient(model, params, carry, fresh)[1] for carry in (end, model.init_state(B)))
    assert with_past == pytest.approx(float(without), rel=1e-6)
    assert abs(loss - with_past) > 1e-3


# ---------------------------------------------------------------------------------------------------- strategies


def _run(strategy, **options):
    model = models.build("rwkv4", vocab_size=V, num_layers=2, dim=64, matmul_precision="highest")
    tx = optim.optimiser(eps=1e-3)  # a large eps keeps Adam from turning rounding into +-lr
    step = train.make_step(model, tx, **options)
    init, step, put = parallel.STRATEGIES[strategy](train.make_init(model, tx, carry_rows=B), step)
    state, losses = init(jax.random.key(0)), []
    for seed in range(3):
        state, values = step(state, put(_batch(seed)), np.float32(1e-2))
        losses.append(float(values["loss_nats"]))
    return state, losses


_reference = functools.cache(lambda **options: _run("single", **options))


@pytest.mark.parametrize(("strategy", "accumulation"), [("pmap", 1), ("fsdp", 2)])
def test_strategies_carry_the_rows_state_alike(strategy, accumulation):
    options = {"segments": K, "stop_gradient": True}
    state, losses = _run(strategy, accumulation=accumulation, **options)
    reference, expected = _reference(**options)
    assert losses == pytest.approx(expected, rel=1e-5)
    host = jax.device_get
    _assert_close(host(state.carry), host(reference.carry))
    _assert_close(host(state.params), host(reference.params))
    for x in jax.tree.leaves(state.carry):
        assert {shard.data.shape[0] for shard in x.addressable_shards} == {B // 4}


def test_a_step_that_is_not_finite_leaves_the_carry(rwkv4):
    model, params = rwkv4
    tx = optim.optimiser()
    carry = _carry(model, params)
    state = _state(params, carry).replace(opt_state=tx.init(params))
    step = jax.jit(train.make_step(model, tx))
    bad, _ = step(state, _batch() | {"mask": np.zeros((B, T), bool)}, 1e-2)  # no target: 0 / 0
    assert bad.skipped == 1 and jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(bad.carry), carry))
    good, _ = step(state, _batch(), 1e-2)
    assert not np.array_equal(jax.tree.leaves(good.carry)[0], jax.tree.leaves(carry)[0])


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("RWKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"line {i * i % 97} of a text that goes on\n" for i in range(500)))
    yield str(path)
    patch.undo()


def _config(text, **changes):
    config = run_config.default()
    config.model.update(num_layers=2, dim=32)
    config.update(corpus=text, steps=6, seq_len=16, batch_size=4, log_every=1, eval_every=0, eval_tokens=0)
    config.update(save_every=2, carry_state=True, segments=2, stop_gradient=True)
    config.data.order = "documents"
    config.update(changes)
    return config


@pytest.mark.parametrize("strategy", ["single", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_run_resumes_with_what_its_rows_remember(strategy, text, tmp_path):
    whole = train.run(_config(text, strategy=strategy), tmp_path / "whole")
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(whole.carry))
    train.run(_config(text, strategy=strategy), tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "6" / "manifest.json").unlink()  # as if killed in this save
    again = train.run(_config(text, strategy=strategy), tmp_path / "cut")
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints")[-1] == 6
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(whole), jax.device_get(again)))


def test_a_branch_begins_with_empty_rows_of_its_own_number(text, tmp_path):
    train.run(_config(text, steps=4), tmp_path / "trunk")
    trunk = str(tmp_path / "trunk" / "checkpoints" / "4")
    state = train.run(_config(text, steps=5, batch_size=2, seq_len=32, branch_from=trunk), tmp_path / "branch")
    assert {x.shape[0] for x in jax.tree.leaves(state.carry)} == {2}
    plain = _config(text, steps=5, branch_from=trunk, carry_state=False)
    assert train.run(plain, tmp_path / "plain").carry is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"carry_state": True, "segments": 5}, "seq_len is 16, expected a multiple of 5 segments"),
        ({"data": {"order": "shuffled"}}, "data.order is 'shuffled' with carry_state, expected 'documents'"),
        ({"model": {"name": "transformer"}}, "carry_state is True and segments 2, .* attention has no state"),
    ],
)
def test_what_cannot_be_carried_is_one_line(changes, line, text, tmp_path):
    config = _config(text)
    config.update(changes)
    with pytest.raises(ValueError, match=line):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
