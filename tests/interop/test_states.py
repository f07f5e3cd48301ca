"""RWKV-4 states in the layouts of other implementations: round trips, and texts that cross implementations."""

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest
from small import D, L, drawn, forward, make, tokens
from weights import one_line

import rwkv_jax
from rwkv_jax.interop import states

WAYS = {
    "rwkv": (states.to_rwkv, states.from_rwkv),
    "transformers": (states.to_transformers, states.from_transformers),
    "production": (states.to_production, states.from_production),
}
every = pytest.mark.parametrize("way", WAYS)


@functools.cache
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


@pytest.mark.parametrize("way, batch", [("rwkv", 1), ("production", 1), ("transformers", 1), ("transformers", 3)])
def test_state_survives_the_round_trip_through_each_layout(way, batch):
    to, back = WAYS[way]
    state = some_state(batch)
    assert same(back(to(state)), state)
    assert same(back(to(jax.device_put(state))), state)


def test_state_layouts_are_those_documented():
    number = iter(range(1, 100))
    vector = lambda: np.full((1, D), next(number), np.float32)
    state = tuple(layer_state([vector() for _ in range(5)]) for _ in range(2))
    # Values as numbered: att_xx 1 and 6, aa 2 and 7, bb 3 and 8, pp 4 and 9, ffn_xx 5 and 10.
    arrays = states.to_rwkv(state)
    assert [x.shape for x in arrays] == [(D,)] * 10 and [x[0] for x in arrays] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    array_ND = states.to_production(state)
    assert array_ND.shape == (10, D) and array_ND[:, 0].tolist() == [5, 1, 2, 3, 4, 10, 6, 7, 8, 9]
    arrays = states.to_transformers(state)
    assert [x.shape for x in arrays] == [(1, D, 2)] * 5
    assert [x[0, 0].tolist() for x in arrays] == [[5, 10], [1, 6], [2, 7], [3, 8], [4, 9]]


def test_state_that_has_read_nothing_is_the_initial_one_of_every_implementation():
    model, _ = tiny()
    empty = jax.device_get(jax.jit(lambda: model.init_state(1))())
    # The same past with any other scale, as a state that learns starts from.
    zero = tuple(layer._replace(wkv=layer.wkv._replace(log_scale=0 * layer.wkv.log_scale)) for layer in empty)
    scale = {"rwkv": lambda x: x[3], "production": lambda x: x[4], "transformers": lambda x: x[4][0, :, 0]}
    for way, (to, back) in WAYS.items():
        theirs = to(empty)
        assert (scale[way](theirs) == np.float32(-1e38 if way == "transformers" else -1e30)).all()
        assert same(back(theirs), empty)
        assert same(back(to(zero)), empty)


def test_state_that_model_run_starts_from_is_read_as_empty():
    """Tokens read after it give the logits of tokens read after nothing."""
    array_ND = np.zeros((5 * L, D))
    array_ND[4::5] = -1e30
    model, params = tiny()
    ours_BTV, _ = forward(model, params, tokens(1, 4), states.from_production(array_ND))
    np.testing.assert_array_equal(ours_BTV, forward(model, params, tokens(1, 4))[0])


@every
def test_state_that_cannot_be_converted_is_named(way):
    to, back = WAYS[way]
    good = to(some_state(1))
    if way != "transformers":
        with one_line(r"^the state has 2 rows, and this layout holds one"):
            to(some_state(2))
        with one_line(rf"^the state has {5 * L - 1} vectors, expected 5 a layer$"):
            back(good[:-1])
    else:
        with one_line(r"^the state has 4 arrays, expected 5 arrays \[B, D, L\]$"):
            back(good[:-1])
    with one_line(r"^the state has shapes \(.*\), expected "):
        back([x[..., None] for x in good])
    with one_line(r"^the state has shapes none, expected "):
        back([])
    with one_line(r"^the state has shapes \(.*\), \(.*\), expected "):
        back([*good[:-1], good[-1][:-1]] if way == "rwkv" else [*good[:-1], good[-1][..., :-1]])
    damaged = [np.array(x) for x in good]
    damaged[2].flat[0] = np.nan
    with one_line(r"^array 2 of the state holds values that are not finite$"):
        back(damaged)
    state = some_state(1)
    with one_line(r"^array 0 of the state holds values that are not finite$"):
        to((state[0]._replace(att_last=state[0].att_last + np.inf), *state[1:]))
    hybrid = jax.eval_shape(lambda: make("hybrid").init_state(1, 8))
    for other in (None, (), hybrid, state[0]):
        with one_line(r"^expected the state of an RWKV-4 model, a LayerState a layer$"):
            to(other)


# ---- live judges

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

TRANSFORMERS = """
import sys
import numpy as np, torch
from transformers import RwkvConfig, RwkvForCausalLM

folder = sys.argv[1]
text, ours = torch.from_numpy(np.load(folder + "/tokens.npy"))[None].long(), np.load(folder + "/ours.npz")
weights = torch.load(folder + "/model.pth")
names = {"emb.": "embeddings.", "blocks.0.ln0": "blocks.0.pre_ln", ".att.": ".attention.", ".ffn.": ".feed_forward.",
    "time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}
def renamed(name):
    for old, new in names.items():
        name = name.replace(old, new)
    return name if name == "head.weight" else "rwkv." + name
V, D = weights["emb.weight"].shape
L = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
model = RwkvForCausalLM(RwkvConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, rescale_every=0)).eval()
model.load_state_dict({renamed(name): x for name, x in weights.items()})
given = lambda kind: [torch.from_numpy(ours[f"{kind}_{i}"]) for i in range(5)]
half = text.shape[1] // 2
with torch.no_grad():
    run = lambda ids, state=None: model(ids, state=state, use_cache=True)
    theirs = [x.clone() for x in run(text[:, :half]).state]
    whole, finished, started = run(text), run(text[:, half:], given("half")), run(text, given("empty"))
np.savez(folder + "/theirs.npz", whole=whole.logits[0], finished=finished.logits[0], started=started.logits[0],
    **{f"half_{i}": x for i, x in enumerate(theirs)})
"""


@pytest.mark.live
@pytest.mark.parametrize(
    "way, program", [("rwkv", RWKV), ("transformers", TRANSFORMERS)], ids=["rwkv", "transformers"]
)
@pytest.mark.parametrize("sizes", [(2, 64), (3, 96)], ids=str)
def test_state_carries_a_text_from_one_implementation_to_the_other(way, program, sizes, tmp_path):
    to, back = WAYS[way]
    model, params = tiny(vocab_size=32, num_layers=sizes[0], dim=sizes[1])
    text = np.random.default_rng(3).integers(0, 32, 41).astype(np.int32)
    half = len(text) // 2
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    np.save(tmp_path / "tokens.npy", text)
    _, ours = forward(model, params, text[None, :half])
    given = {
        f"{kind}_{i}": x for kind, s in (("half", ours), ("empty", model.init_state(1))) for i, x in enumerate(to(s))
    }
    np.savez(tmp_path / "ours.npz", **given)
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    theirs = dict(np.load(tmp_path / "theirs.npz"))

    def close(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        return actual.shape == expected.shape and np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()

    arrays = [theirs[f"half_{i}"] for i in range(len(to(ours)))]
    whole_TV = theirs["whole"]
    assert close(theirs["finished"], whole_TV[half:]) and close(theirs["started"], whole_TV)
    assert close(forward(model, params, text[None, half:], back(arrays))[0][0], whole_TV[half:])
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(back(arrays)), strict=True):
        assert close(mine, other)
