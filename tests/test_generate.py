import functools
import itertools
import json
import logging
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import error_ratio
from scipy import stats

import rwkv_jax
from rwkv_jax import checkpoint
from rwkv_jax.generate import DISPATCH, PROMPT_CHUNK, generate, prefill, sample, stream
from rwkv_jax.generate.__main__ import main
from rwkv_jax.tokenizers import ByteTokenizer

LAYERS = {"rwkv4": ("rwkv4",), "transformer": ("attention",), "hybrid": ("rwkv4", "attention")}
KINDS = pytest.mark.parametrize("kind", ["rwkv4", "hybrid"])
FIELDS = {"vocab_size": 256, "dim": 16, "matmul_precision": "highest"}


@functools.cache
def case(kind):
    """A model and parameters with which nothing is zero, and that remember long."""
    model = rwkv_jax.build("rwkv4", layers=LAYERS[kind], num_layers=len(LAYERS[kind]), **FIELDS)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return (-4 if path[-1].key == "time_decay" else 0) + 0.5 * rng.standard_normal(leaf.shape, np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def unstacked(kind):
    model, params = case(kind)
    return model.clone(scan=False), rwkv_jax.unstack(params)


def ids(length, seed=2):
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


# -------------------------------------------------------------------------------------------------- prefill


@KINDS
@pytest.mark.parametrize("length", [1, PROMPT_CHUNK, 2 * PROMPT_CHUNK + 40])
def test_prefill_is_one_pass_over_the_prompt(kind, length):
    model, params = case(kind)
    tokens_BT = np.array([ids(length), ids(length, seed=3)])
    logits_BV, state = prefill(model, params, tokens_BT, model.init_state(2, 768))
    whole = jax.jit(lambda state: model.apply({"params": params}, tokens_BT, state))
    expected_BTV, expected_state = whole(model.init_state(2, 768))
    assert error_ratio(logits_BV, expected_BTV[:, -1]) < 1e-5
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for actual, expected in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert actual.dtype == expected.dtype and error_ratio(actual, expected) < 1e-5


def test_prefill_leaves_the_state_it_is_given_usable():
    model, params = unstacked("rwkv4")
    state = prefill(model, params, np.array([ids(20)]))[1]
    before = jax.tree.map(np.array, state)  # copies: a view of a buffer would keep it from being recycled
    first, second = (prefill(model, params, np.array([[7, 8]]), state) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, before, state)
    assert error_ratio(first[0], prefill(model, params, np.array([[*ids(20), 7, 8]]))[0]) < 1e-5


def test_prefill_needs_a_token():
    with pytest.raises(ValueError, match="no tokens to read"):
        prefill(*unstacked("rwkv4"), np.zeros((1, 0), int))


# -------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", LAYERS)
def test_each_token_follows_from_one_full_pass(kind):
    model, params = case(kind)
    prompt, num_new = ids(5), DISPATCH + 8
    forward = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT)[0][:, len(prompt) - 1 :])

    tokens = generate(model, params, prompt, max_new_tokens=num_new, temperature=0)
    assert tokens == forward(np.array([prompt + tokens[:-1]]))[0].argmax(-1).tolist()

    # greedy text goes in circles, so drawn text as well
    tokens = generate(model, params, prompt, max_new_tokens=num_new, temperature=2.0, seed=7)
    logits_TV = forward(np.array([prompt + tokens[:-1]]))[0]
    keys = [jax.random.fold_in(jax.random.key(7), i) for i in range(num_new)]
    assert tokens == [int(sample(logits_TV[i, None], keys[i], 2.0)[0]) for i in range(num_new)]
    assert len(set(tokens)) > num_new / 2


@KINDS
def test_layouts_of_the_parameters_and_batches_agree(kind):
    one = generate(*case(kind), ids(5), max_new_tokens=20, seed=7)
    assert one == generate(*unstacked(kind), np.array(ids(5), np.uint16), max_new_tokens=20, seed=7)
    batch = np.array([ids(5), ids(5, seed=3)])
    greedy_BT = generate(*unstacked(kind), batch, max_new_tokens=20, temperature=0)
    assert greedy_BT.shape == (2, 20)
    for row, greedy in zip(batch, greedy_BT, strict=True):
        assert greedy.tolist() == generate(*unstacked(kind), row, max_new_tokens=20, temperature=0)


def test_a_seed_is_a_text():
    draw = functools.partial(generate, *unstacked("rwkv4"), ids(5))
    tokens = draw(max_new_tokens=DISPATCH + 8, seed=7)
    assert tokens == draw(max_new_tokens=DISPATCH + 8, seed=7)
    assert tokens[:10] == draw(max_new_tokens=10, seed=7)
    assert tokens != draw(max_new_tokens=DISPATCH + 8, seed=8)
    assert all(isinstance(token, int) for token in tokens)


def test_an_empty_prompt_is_the_separator():
    assert generate(*unstacked("rwkv4"), [], seed=7) == generate(*unstacked("rwkv4"), [0], seed=7)
    first, second = generate(*unstacked("rwkv4"), np.zeros((2, 0), int), max_new_tokens=9, temperature=0)
    assert first.tolist() == second.tolist() == generate(*unstacked("rwkv4"), [0], max_new_tokens=9, temperature=0)


@pytest.mark.parametrize("kind", ["rwkv4", "transformer"])
def test_nothing_is_compiled_twice(kind, caplog):
    model = rwkv_jax.build(kind, vocab_size=256, num_layers=1, dim=8, scan=False)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        generate(model, params, ids(5), max_new_tokens=3)
        generate(model, params, ids(7), max_new_tokens=DISPATCH + 1, temperature=0, top_p=1)
        generate(model.clone(), params, ids(8), max_new_tokens=100, temperature=0.5, top_p=0.9, seed=3)
        list(stream(model, params, "abcdef", ByteTokenizer(), max_new_tokens=5))
    messages = [record.message for record in caplog.records if "XLA compilation of" in record.message]
    assert [sum(f"jit({name})" in message for message in messages) for name in ("_read", "_decode")] == [1, 1]


# -------------------------------------------------------------------------------------------------- sampling

LOGITS = np.array([1.0, -1.0, 0.5, 2.0, 0.5, -1.2, 0.0, 1.5], np.float32)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def nucleus(p, top_p):
    """The smallest set that reaches top_p, among all sets; of equally small ones the likeliest, then the lowest."""
    sets = (s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size))
    reach = [s for s in sets if p[list(s)].sum() >= top_p]
    return min(reach, key=lambda s: (len(s), -round(p[list(s)].sum(), 9), s))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.75, 0.9, 1.0])
def test_frequencies_are_the_probabilities_of_the_nucleus(temperature, top_p):
    tokens = np.asarray(sample(jnp.tile(LOGITS, (20000, 1)), jax.random.key(3), temperature, top_p))
    p = softmax(LOGITS / temperature)
    kept = nucleus(p, top_p - 1e-6) if top_p == 1 else nucleus(p, top_p)
    assert set(tokens.tolist()) == set(kept)
    if len(kept) > 1:
        counts = np.bincount(tokens, minlength=len(p))[list(kept)]
        assert stats.chisquare(counts, 20000 * p[list(kept)] / p[list(kept)].sum()).pvalue > 1e-3


def test_nucleus_ends_with_the_token_that_reaches_top_p():
    p = np.array([0.25, 0.125, 0.5, 0.125])
    for top_p, kept in ((0.5, {2}), (0.5001, {0, 2}), (0.75, {0, 2}), (0.76, {0, 1, 2}), (0.876, {0, 1, 2, 3})):
        tokens = sample(jnp.tile(jnp.log(p), (500, 1)), jax.random.key(0), 1.0, top_p)
        assert set(tokens.tolist()) == kept


def test_rows_are_drawn_each_from_its_own_logits():
    logits_BV = np.where(np.arange(6) // 2 == np.array([[2], [0], [1]]), 0.0, -20.0)
    for seed in range(10):
        assert (sample(logits_BV, jax.random.key(seed), 1.0, 0.9) // 2).tolist() == [2, 0, 1]


def test_temperature_zero_is_the_argmax_and_small_ones_approach_it():
    logits_BV = 1e4 * np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    for temperature, top_p in ((0, 1.0), (0, 0.5), (1e-36, 1.0), (1e-36, 0.5)):
        assert sample(logits_BV, jax.random.key(0), temperature, top_p).tolist() == logits_BV.argmax(-1).tolist()


# -------------------------------------------------------------------------------------------------- text


@KINDS
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_stream_is_the_text_of_generate(kind, top_p):
    settings = {"max_new_tokens": 60, "temperature": 1.3, "top_p": top_p, "seed": 5}
    tokens = generate(*unstacked(kind), list("日本".encode()), **settings)
    pieces = list(stream(*unstacked(kind), "日本", ByteTokenizer(), **settings))
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")
    assert all(pieces) and len(pieces) > 10


def test_stream_never_breaks_a_character():
    """With blocks that are zero, a model of bigrams: this one goes round and round a text."""
    text = "é日😀."
    cycle = list(text.encode())
    model = rwkv_jax.build("rwkv4", num_layers=1, **FIELDS | {"dim": 256})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params["emb"]["embedding"] = np.eye(256, dtype=np.float32)
    params["ln0"]["scale"] = params["ln_out"]["scale"] = np.ones(256, np.float32)
    params["head"]["kernel"][cycle, cycle[1:] + cycle[:1]] = 1
    continued = functools.partial(stream, model, params, "x.", ByteTokenizer(), temperature=0)
    assert list(continued(max_new_tokens=20)) == list(text) * 2
    assert list(continued(max_new_tokens=8)) == ["é", "日", "\ufffd"]  # three bytes of four


def test_stream_computes_nothing_ahead():
    pieces = stream(*unstacked("rwkv4"), "abc", ByteTokenizer(), max_new_tokens=2**32 - 1)
    first = list(itertools.islice(pieces, 5))
    assert first == list(itertools.islice(stream(*unstacked("rwkv4"), "abc", ByteTokenizer()), 5))


def test_mistakes_are_named_when_asked_not_when_read():
    model, params = unstacked("rwkv4")
    for change, message in (
        ({"prompt_ids": [1, 256]}, "holds token 256, expected ids from 0 to 255"),
        ({"prompt_ids": [-1]}, "holds token -1"),
        ({"prompt_ids": "abc"}, "expected ids"),
        ({"prompt_ids": [0.5]}, "expected ids"),
        ({"prompt_ids": np.zeros((0, 3), int)}, "expected ids"),
        ({"temperature": -1}, "temperature is -1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0, expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, params, **{"prompt_ids": [1]} | change)
    with pytest.raises(ValueError, match="top_p is 0"):
        stream(model, params, "a", ByteTokenizer(), top_p=0)
    with pytest.raises(ValueError, match="tokenizer bytes has 256 tokens, the model 100"):
        stream(model.clone(vocab_size=100), params, "a", ByteTokenizer())
    with pytest.raises(ValueError, match="tokenizer bytes has 256 tokens, the model 300"):
        stream(model.clone(vocab_size=300), params, "a", ByteTokenizer())


# -------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoints", 3, {"params": case("rwkv4")[1]})
    config = {"model": {"name": "rwkv4", "num_layers": 1} | FIELDS, "tokenizer": "bytes", "seq_len": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def command(*arguments):
    return [sys.executable, "-W", "error", "-m", "rwkv_jax.generate", *map(str, arguments)]


def test_command_line(workdir):
    settings = {"max_new_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 4}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        command(f"--model={workdir}", "--prompt=日本", *arguments), capture_output=True, env=os.environ
    )
    expected = "".join(stream(*unstacked("rwkv4"), "日本", ByteTokenizer(), **settings))
    assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", expected + "\n")


@pytest.mark.parametrize("ending", ["interrupted", pytest.param("nobody reads on", marks=pytest.mark.slow)])
def test_command_line_stops_when_told(workdir, ending):
    arguments = (f"--model={workdir}", "--prompt=a", "--max_new_tokens=1000000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a suite that runs in the background may have SIGINT ignored, which its children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command(*arguments), env=os.environ, **pipes) as process:
        assert process.stdout.read(10)
        if ending == "interrupted":
            process.send_signal(signal.SIGINT)
            assert process.stdout.read().endswith(b"\n")
        else:
            process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == (130 if ending == "interrupted" else 0)


def test_command_line_says_what_is_wrong_in_one_line(workdir, tmp_path, capsys):
    good = {"model": workdir, "prompt": "a"}
    for change, message in (
        ({"model": tmp_path / "none.pth"}, "none.pth: no such file"),
        ({"model": tmp_path}, "config.json"),
        ({"tokenizer": tmp_path / "none.json"}, "none.json"),
        ({"top_p": 2}, "top_p is 2"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
    ):
        assert main([f"--{name}={value}" for name, value in (good | change).items()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err
