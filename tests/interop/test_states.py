"""States in the layout of the `rwkv` package, and tuned states in that of released files: round trips and mistakes."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from small import D, L, forward, made, make
from weights import one_line

import rwkv_jax
from rwkv_jax import generate, interop
from rwkv_jax.interop import pth
from rwkv_jax.interop.states import from_rwkv, from_time_state, to_rwkv, to_time_state
from rwkv_jax.train import methods

H, K = 2, 4  # heads and their channels in `small.make`
KINDS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
LAYOUT = {
    "rwkv4": [(D,)] * 5,  # att_xx, aa, bb, pp, ffn_xx
    "rwkv5": [(D,), (H, K, K), (D,)],
    "rwkv6": [(D,), (H, K, K), (D,)],
    "rwkv7": [(D,), (H, K, K), (D,)],
}


def some_state(model, batch):
    rng = np.random.default_rng(batch)
    shapes = jax.eval_shape(lambda: model.init_state(batch))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_to_rwkv_and_from_rwkv_are_inverse_in_the_documented_layout(kind):
    model = make(kind)
    state = some_state(model, 1)
    arrays = to_rwkv(model, state)
    assert [x.shape for x in arrays] == LAYOUT[kind] * L and {x.dtype for x in arrays} == {np.dtype(np.float32)}
    assert same(from_rwkv(model, arrays), state) and same(
        from_rwkv(model, to_rwkv(model, jax.device_put(state))), state
    )
    each = len(LAYOUT[kind])
    for i, layer in enumerate(state):
        expected = [x[0] for x in jax.tree.leaves(layer)]
        if kind == "rwkv7":
            expected[1] = expected[1].transpose(0, 2, 1)
        for theirs, ours in zip(arrays[each * i : each * (i + 1)], expected, strict=True):
            np.testing.assert_array_equal(theirs, ours)


def test_to_rwkv_and_from_rwkv_map_the_empty_state_to_the_empty_state():
    model = make("rwkv4")
    empty = jax.device_get(jax.jit(lambda: model.init_state(1))())
    # The same past at another scale, such as the start of a tuned state.
    zero = tuple(layer._replace(wkv=layer.wkv._replace(log_scale=0 * layer.wkv.log_scale)) for layer in empty)
    for state in (empty, zero):
        theirs = to_rwkv(model, state)
        assert (theirs[3] == np.float32(-1e30)).all()
        assert same(from_rwkv(model, theirs), empty)


def test_to_rwkv_and_from_rwkv_name_what_they_cannot_convert():
    model = make("rwkv7")
    state = some_state(model, 1)
    good = to_rwkv(model, state)
    infinite = [good[0], np.full_like(good[1], np.inf), *good[2:]]
    for arrays, message in (
        (good[:-1], rf"^the state has {3 * L - 1} arrays, expected {3 * L}, 3 a layer$"),
        ([], rf"^the state has 0 arrays, expected {3 * L}, 3 a layer$"),
        ([*good[:-1], good[-1][:-1]], r"^array 5 of the state is \(7,\), expected \(8,\)$"),
        ([good[0], [[1], [2, 3]], *good[2:]], r"^the state is not a list of arrays: "),
        (
            [x * 1e300 for x in map(np.float64, good)],
            r"^array 0 of the state holds -?\d\S*e\+\d+, and the largest float3",
        ),
        (infinite, r"^array 1 of the state holds values that are not finite$"),
    ):
        with one_line(message):
            from_rwkv(model, arrays)
    with one_line(r"^the state has 2 rows, expected one"):
        to_rwkv(model, some_state(model, 2))
    with one_line(r"^array 0 of the state holds values that are not finite$"):
        to_rwkv(model, (state[0]._replace(att_last=state[0].att_last + np.inf), *state[1:]))
    for other in (None, (), state[0], some_state(make("rwkv4"), 1)):
        with one_line(rf"^expected the state of this model, a tuple of {L} layers$"):
            to_rwkv(model, other)
    with one_line(r"^an array of the state is \(1, 1, 8, 8\), expected \(1, 2, 4, 4\)$"):
        to_rwkv(model, some_state(make("rwkv7", head_size=8), 1))
    for other, found in (
        (make("hybrid"), "'rwkv4', 'attention'"),
        (make("lstm"), "'lstm'"),
        (make("rwkv4", token_shift=False), "'rwkv4', token_shift=False"),
    ):
        with one_line(rf"^the rwkv package runs released RWKV models only, and this one has {found}$"):
            from_rwkv(other, good)


# ---- tuned states


def tuned_of(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: methods.untuned_state(model))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_to_time_state_and_from_time_state_are_inverse_value_major(kind):
    model = make(kind)
    tuned = tuned_of(model)
    tensors = to_time_state(tuned)
    assert list(tensors) == [f"blocks.{i}.att.time_state" for i in range(L)]
    for i, x in enumerate(tensors.values()):
        np.testing.assert_array_equal(x, tuned["blocks"]["wkv"][i].transpose(0, 2, 1))
    others = {"head.weight": np.zeros(3)}  # as in a file that also holds the weights
    assert same(from_time_state(model, tensors | others), methods.tuned_state(model, tuned, 1))


def test_from_time_state_names_a_missing_or_misshapen_tuned_state():
    model = make("rwkv6")
    good = to_time_state(tuned_of(model))
    with one_line(r"^key 'blocks.0.att.time_state' is missing, expected the tuned state of 2 layers$"):
        from_time_state(model, {})
    with one_line(r"^'blocks.0.att.time_state' has shape \(2, 4, 4\), expected \(1, 8, 8\)$"):
        from_time_state(make("rwkv6", head_size=8), good)
    name, x = next(iter(good.items()))
    for key, wrong, line in (
        ("blocks.2.att.time_state", x, "^unknown key 'blocks.2.att.time_state', expected .* of 2 layers$"),
        (name, x * np.nan, "^'blocks.0.att.time_state' holds values that are not finite$"),
        (name, x.astype(np.int32), "^'blocks.0.att.time_state' has dtype int32, expected floating point$"),
    ):
        with one_line(line):
            from_time_state(model, good | {key: wrong})
    with one_line(
        r"^no released form of a tuned state that has att_last, ffn_last, log_den, value; expected matrices"
    ):
        to_time_state(tuned_of(make("rwkv4")))
    for kind in ("rwkv4", "transformer"):
        with one_line(r"^no released file has a tuned state of '(rwkv4|attention)' layers$"):
            from_time_state(make(kind), good)


# ---- live judge

RWKV = """
import json, os, sys
os.environ["RWKV_JIT_ON"] = os.environ["RWKV_CUDA_ON"] = "0"
os.environ["RWKV_V7_ON"] = sys.argv[2]
import numpy as np, torch
from rwkv.model import RWKV

for folder in json.loads(sys.argv[1]):
    ours = np.load(folder + "/ours.npz")
    text, num_new = ours["text"].tolist(), int(ours["num_new"])
    model = RWKV(model=folder + "/model", strategy="cpu fp32")
    clones = lambda state: [x.clone() for x in state]  # version 7 is edited in place
    given = lambda kind: [torch.from_numpy(ours[f"{kind}_{i}"]) for i in range(sum(kind in k for k in ours))]

    def greedy(logits, state):
        new = []
        for _ in range(num_new):
            new.append(int(logits.argmax()))
            logits, state = model.forward(new[-1:], state)
        return new, logits

    whole, state = model.forward(text, None, full_output=True)
    results = {f"end_{i}": x for i, x in enumerate(clones(state))}
    started, _ = model.forward(text, given("empty"), full_output=True)
    half = len(text) // 2
    _, state = model.forward(text[:half], None)
    results |= {f"half_{i}": x for i, x in enumerate(clones(state))}
    finished, state = model.forward(text[half:], given("half"), full_output=True)
    new, last = greedy(finished[-1], state)
    tuned, _ = model.forward(text, given("tuned"), full_output=True)
    results |= {"whole": whole, "started": started, "finished": finished, "new": new, "last": last, "tuned": tuned}
    if os.path.exists(folder + "/overlaid.pth"):
        model = RWKV(model=folder + "/overlaid", strategy="cpu fp32")
        results["overlaid"], _ = model.forward(text, None, full_output=True)
    np.savez(folder + "/theirs.npz", **results)
"""
NUM_NEW = 200
SHAPES = (  # at least two heads: with one the package mistakes matrices for vectors
    {"vocab_size": 40, "num_layers": 2, "dim": 64, "head_size": 32},
    {"vocab_size": 300, "num_layers": 7, "dim": 128, "hidden_dim": 96},
    {"vocab_size": 1000, "num_layers": 3, "dim": 192},
)


@functools.cache
def to_scale(kind, i):
    """(model, params, text, a tuned state); the matrices preserve the scale of their inputs."""
    model, params = made(kind, **({"head_size": 64} | SHAPES[i]))
    gains = {"kernel": 3, "1": 1, "2": 1}  # gains of full matrices and of low-rank ones

    def scaled(path, x):
        name = path[-1].key
        gain = gains.get(name, gains.get(name[-1]))
        return x if gain is None else x * np.float32(gain / x.shape[-2] ** 0.5)

    params = jax.tree_util.tree_map_with_path(scaled, params)
    text = np.random.default_rng(i).integers(0, model.vocab_size, 41).astype(np.int32)
    return model, params, text, tuned_of(model, seed=i)


def close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    return actual.shape == expected.shape and np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def write_for_the_package(folder, kind, i):
    model, params, text, tuned = to_scale(kind, i)
    folder.mkdir()
    rwkv_jax.save(folder / "model.pth", model, params)
    _, half = forward(model, params, text[None, : len(text) // 2])
    states = {"half": half, "empty": model.init_state(1), "tuned": methods.tuned_state(model, tuned, 1)}
    arrays = {f"{name}_{j}": x for name, state in states.items() for j, x in enumerate(to_rwkv(model, state))}
    np.savez(folder / "ours.npz", text=text, num_new=NUM_NEW, **arrays)
    if kind in ("rwkv5", "rwkv6"):  # the package reads `time_state` of these versions only
        pth.write(folder / "overlaid.pth", interop.to_official(params) | to_time_state(tuned))


def read_back(model, arrays, name):
    """The state whose arrays the package's program has saved as name_0, name_1, ..."""
    count = sum(key.startswith(f"{name}_") for key in arrays)
    return from_rwkv(model, [arrays[f"{name}_{j}"] for j in range(count)])


@pytest.mark.live
@pytest.mark.parametrize("kind", KINDS)
def test_to_rwkv_and_from_rwkv_carry_a_text_to_the_package_and_back(kind, tmp_path):
    """Compares logits, states, and greedy tokens after a text of which each side has read one half."""
    folders = [tmp_path / str(i) for i in range(len(SHAPES))]
    for i, folder in enumerate(folders):
        write_for_the_package(folder, kind, i)
    command = [sys.executable, "-c", RWKV, json.dumps([str(folder) for folder in folders]), str(int(kind == "rwkv7"))]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for i, folder in enumerate(folders):
        model, params, text, tuned = to_scale(kind, i)
        half, theirs = len(text) // 2, dict(np.load(folder / "theirs.npz"))
        read = functools.partial(read_back, model, theirs)
        whole_BTV, end = forward(model, params, text[None])
        assert close(whole_BTV[0], theirs["whole"])
        assert close(theirs["started"], whole_BTV[0]) and close(theirs["finished"], whole_BTV[0, half:])
        assert close(forward(model, params, text[None, half:], read("half"))[0], whole_BTV[:, half:])
        for ours, other in zip(jax.tree.leaves(end), jax.tree.leaves(read("end")), strict=True):
            assert close(ours, other)
        tuned_BTV, _ = forward(model, params, text[None], methods.tuned_state(model, tuned, 1))
        assert close(theirs["tuned"], tuned_BTV[0]) and not close(whole_BTV, tuned_BTV, 1e-2)
        if kind in ("rwkv5", "rwkv6"):
            assert close(theirs["overlaid"], tuned_BTV[0])

        # we continue the package's state, and it continues ours
        before = generate.Context(read("end"), theirs["whole"][None, -1])
        settings = {"max_new_tokens": NUM_NEW, "temperature": 0, "stop_tokens": ()}
        ((new, *_), after) = generate.generate_with_context(model, params, [[]], context=before, **settings)
        assert new == theirs["new"].tolist() and len(set(new)) > 3  # not one token repeated
        assert close(after.logits_BV[0], theirs["last"], 1e-4)
