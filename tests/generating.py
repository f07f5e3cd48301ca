"""Models for the tests of generation, and one pass over whole texts as their reference.

Every program is compiled for a batch of 1 or of `B`, and most for prompts that fit a chunk of 16 tokens: the tests of
all files then share few programs.
"""

import functools

import jax
import numpy as np
import pytest
from judge import worst_ratio
from small import drawn

import rwkv_jax
from rwkv_jax.generate import Context
from rwkv_jax.generate.context import begin

LAYERS = {"rwkv4": ("rwkv4",), "hybrid": ("rwkv4", "attention")} | {f"rwkv{i}": (f"rwkv{i}",) * 2 for i in (5, 6, 7)}
# The caches of attention have fast tests of their own.
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in LAYERS if kind != "rwkv4"]
KINDS = pytest.mark.parametrize("kind", ["rwkv4", *SLOW])
FIELDS = {"vocab_size": 256, "dim": 16, "hidden_dim": 64}  # as loaded from a .pth
B, LENGTH, SLOTS = 3, 544, 768  # batch, tokens and cache slots of the pass over whole texts
NEARLY_GREEDY = {"temperature": 1e-4}  # shares the program that draws; temperature 0 compiles another


@functools.cache
def case(kind):
    return drawn(rwkv_jax.build("rwkv4", layers=LAYERS[kind], num_layers=len(LAYERS[kind]), **FIELDS))


@functools.cache
def unstacked(kind):
    model, params = case(kind)
    return model.clone(scan=False), rwkv_jax.unstack(jax.tree.map(np.asarray, params))


def ids(length, seed=2):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def filled(kind, batch, room=1, seed=0) -> Context:
    """A context of random numbers with the shapes of one after texts, with empty caches."""
    rng = np.random.default_rng(seed)
    context = begin(unstacked(kind)[0], None, batch, room)

    def fill(x):
        return np.array(x) if np.issubdtype(x.dtype, np.integer) else rng.standard_normal(x.shape).astype(x.dtype)

    return jax.tree.map(fill, context)


def whole(model, params, texts) -> tuple[list[np.ndarray], Context]:
    """(logits [T, V] of each of at most `B` texts, the context after them), from one pass over all their tokens."""
    tokens_BT, valid_BT = np.zeros((B, LENGTH), np.int32), np.zeros((B, LENGTH), bool)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)], valid_BT[row, : len(text)] = text, True
    logits_BTV, state = jax.device_get(_whole(model, params, tokens_BT, valid_BT))
    logits = [row_TV[: len(text)] for row_TV, text in zip(logits_BTV, texts, strict=False)]
    state = jax.tree.map(lambda x: x[: len(texts)], state)
    return logits, Context(state, np.stack([row_TV[-1] for row_TV in logits]))


@functools.partial(jax.jit, static_argnums=0)
def _whole(model, params, tokens_BT, valid_BT):
    return model.apply({"params": params}, tokens_BT, model.init_state(B, SLOTS), valid_BT=valid_BT)


def assert_near(actual: Context, expected: Context):
    """Check every row of every leaf; of caches, the filled slots."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(_held(actual)), jax.tree.leaves(_held(expected)), strict=True):
        assert x.dtype == y.dtype and worst_ratio(x, y, axis=0) < 1e-5


def _held(context):
    """The context with caches as long as the longest text, and zeros after each text."""

    def cut(entry):
        if not hasattr(entry, "cache"):
            return entry
        length_B = entry.cache.length_B
        held_BS = np.arange(length_B.max())[None] < length_B[:, None]
        only = lambda x_BHSK: np.where(held_BS[:, None, :, None], x_BHSK[:, :, : held_BS.shape[1]], 0)
        k_BHSK, v_BHSK = only(entry.cache.k_BHSK), only(entry.cache.v_BHSK)
        return entry._replace(cache=entry.cache._replace(k_BHSK=k_BHSK, v_BHSK=v_BHSK))

    context = jax.device_get(context)
    return Context(tuple(map(cut, context.state)), context.logits_BV)


def assert_read(kind, context: Context, *texts):
    """Check that the context is the one after these texts, each a non-empty list of ids."""
    assert len(context.logits_BV) == len(texts)
    assert_near(context, whole(*unstacked(kind), texts)[1])


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def row(context: Context, b: int) -> Context:
    """Equals `rows(context, b)`, without JAX."""
    return jax.tree.map(lambda x: np.asarray(x)[[b]], context)


def cycling(text):
    """(model, params) of bigrams, with blocks that are zero: they repeat this text of at most 16 distinct bytes
    endlessly."""
    cycle, width = list(text.encode()), FIELDS["dim"]
    model, params = unstacked("rwkv4")
    params = jax.tree.map(np.zeros_like, params)
    params["emb"]["embedding"][cycle] = np.eye(width, dtype=np.float32)[: len(cycle)]
    params["ln0"]["scale"] = params["ln_out"]["scale"] = np.ones(width, np.float32)
    params["head"]["kernel"][np.arange(len(cycle)), cycle[1:] + cycle[:1]] = 1
    return model, params
