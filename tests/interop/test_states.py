"""RWKV-4 states as the `rwkv` package keeps them: the round trip, and texts that cross implementations."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from small import D, L, drawn, forward, make
from weights import one_line

import rwkv_jax
from rwkv_jax.interop.states import from_rwkv, to_rwkv


def tiny(kind="rwkv4", **fields):
    return drawn(make(kind, **fields))


def layer_state(vectors):
    """Of one layer, from att_last, num, den, log_scale and ffn_last."""
    att_last, *wkv, ffn_last = vectors
    return rwkv_jax.models.rwkv4.LayerState(att_last, rwkv_jax.ops.WKV4State(*wkv), ffn_last)


def some_state(batch):
    rng = np.random.default_rng(batch)
    vector = lambda: rng.standard_normal((batch, D), np.float32)
    return tuple(layer_state([vector() for _ in range(5)]) for _ in range(L))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_state_survives_the_round_trip_in_the_documented_layout():
    state = some_state(1)
    arrays = to_rwkv(state)
    assert same(from_rwkv(arrays), state) and same(from_rwkv(to_rwkv(jax.device_put(state))), state)
    for i, layer in enumerate(state):  # att_xx, aa, bb, pp, ffn_xx
        for theirs, ours in zip(arrays[5 * i : 5 * i + 5], (layer.att_last, *layer.wkv, layer.ffn_last), strict=True):
            np.testing.assert_array_equal(theirs, ours[0])


def test_state_that_has_read_nothing_is_the_initial_one_of_both():
    model, _ = tiny()
    empty = jax.device_get(jax.jit(lambda: model.init_state(1))())
    # The same past with any other scale, as a state that learns starts from.
    zero = tuple(layer._replace(wkv=layer.wkv._replace(log_scale=0 * layer.wkv.log_scale)) for layer in empty)
    for state in (empty, zero):
        theirs = to_rwkv(state)
        assert (theirs[3] == np.float32(-1e30)).all()
        assert same(from_rwkv(theirs), empty)


def test_state_that_cannot_be_converted_is_named():
    state = some_state(1)
    good = to_rwkv(state)
    infinite = [good[0], np.full_like(good[1], np.inf), *good[2:]]
    for arrays, message in (
        (good[:-1], rf"^the state has {5 * L - 1} vectors, expected 5 a layer$"),
        ([], r"^the state has shapes none, expected "),
        ([*good[:-1], good[-1][:-1]], r"^the state has shapes \(.*\), \(.*\), expected "),
        (infinite, r"^array 1 of the state holds values that are not finite$"),
    ):
        with one_line(message):
            from_rwkv(arrays)
    with one_line(r"^the state has 2 rows, and theirs holds one"):
        to_rwkv(some_state(2))
    with one_line(r"^array 0 of the state holds values that are not finite$"):
        to_rwkv((state[0]._replace(att_last=state[0].att_last + np.inf), *state[1:]))
    hybrid = jax.eval_shape(lambda: make("hybrid").init_state(1, 8))
    for other in (None, (), hybrid, state[0]):
        with one_line(r"^expected the state of an RWKV-4 model, a LayerState a layer$"):
            to_rwkv(other)


# ---- live judge

RWKV = """
import os, sys
os.environ["RWKV_JIT_ON"] = os.environ["RWKV_CUDA_ON"] = "0"
import numpy as np, torch
from rwkv.model import RWKV

folder = sys.argv[1]
text, ours = np.load(folder + "/tokens.npy").tolist(), np.load(folder + "/ours.npz")
model = RWKV(model=folder + "/model", strategy="cpu fp32")
half = len(text) // 2
_, theirs = model.forward(text[:half], None)
given = lambda kind: [torch.from_numpy(ours[f"{kind}_{i}"]) for i in range(len(theirs))]
whole, _ = model.forward(text, None, full_output=True)
finished, _ = model.forward(text[half:], given("half"), full_output=True)
started, _ = model.forward(text, given("empty"), full_output=True)
np.savez(folder + "/theirs.npz", whole=whole, finished=finished, started=started,
    **{f"half_{i}": x for i, x in enumerate(theirs)})
"""


@pytest.mark.live
def test_state_carries_a_text_to_the_package_and_back(tmp_path):
    model, params = tiny(vocab_size=32, num_layers=3, dim=96)
    text = np.random.default_rng(3).integers(0, 32, 41).astype(np.int32)
    half = len(text) // 2
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    np.save(tmp_path / "tokens.npy", text)
    _, ours = forward(model, params, text[None, :half])
    given = {f"half_{i}": x for i, x in enumerate(to_rwkv(ours))}
    given |= {f"empty_{i}": x for i, x in enumerate(to_rwkv(model.init_state(1)))}
    np.savez(tmp_path / "ours.npz", **given)
    run = subprocess.run([sys.executable, "-c", RWKV, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    theirs = dict(np.load(tmp_path / "theirs.npz"))

    def close(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        return actual.shape == expected.shape and np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()

    arrays = [theirs[f"half_{i}"] for i in range(5 * 3)]
    whole_TV = theirs["whole"]
    assert close(forward(model, params, text[None])[0][0], whole_TV)
    assert close(theirs["finished"], whole_TV[half:]) and close(theirs["started"], whole_TV)
    assert close(forward(model, params, text[None, half:], from_rwkv(arrays))[0][0], whole_TV[half:])
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(from_rwkv(arrays)), strict=True):
        assert close(mine, other)
