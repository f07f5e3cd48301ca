import functools
import json
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from judge import error_ratio
from small import drawn

import rwkv_jax
from rwkv_jax import checkpoint, evaluate
from rwkv_jax.corpora import Split
from rwkv_jax.tokenizers import get_tokenizer

KINDS = pytest.mark.parametrize("kind", ["rwkv4", "transformer"])
STARTS = np.array([0, 23, 24, 30, 101, 140])  # one document is empty, one is longer than several windows
ENDS = np.array([23, 24, 30, 101, 140, 151])
SEQ_LEN = 16
FIELDS = {"vocab_size": 256, "num_layers": 2, "dim": 16, "matmul_precision": "highest"}

TOKENS = np.random.default_rng(2).integers(1, 256, 151).astype(np.uint8)
TOKENS[STARTS] = 0

log_likelihoods = jax.jit(evaluate.log_likelihoods, static_argnums=0)


@functools.cache
def case(kind):
    return drawn(rwkv_jax.build(kind, **FIELDS))


@functools.cache
def _forward(kind):
    model, params = case(kind)
    return jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT)[0])


def alone(kind, tokens):
    """Nats of tokens[1:] from one pass over them and nothing else, the softmax in float64."""
    padded = np.zeros((1, len(TOKENS)), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(_forward(kind)(padded), np.float64)[0, : len(tokens) - 1]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(tokens) - 1), np.asarray(tokens[1:], int)]


def alike(actual, expected):
    return error_ratio(actual, expected) < 1e-6


@pytest.fixture
def compilations(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: sum("XLA compilation of jit(log_likelihoods)" in record.message for record in caplog.records)


# ------------------------------------------------------------------------------------------------ the primitive


@KINDS
def test_log_likelihoods_are_the_log_softmax(kind):
    assert len(TOKENS) > evaluate.POSITIONS + 1  # positions are scored in more than one group
    loglik_BT, _ = log_likelihoods(*case(kind), np.stack([TOKENS, TOKENS[::-1]]))
    assert loglik_BT.shape == (2, 150) and loglik_BT.dtype == jnp.float32
    assert alike(-loglik_BT, [alone(kind, TOKENS), alone(kind, TOKENS[::-1])])


def test_log_likelihoods_of_bfloat16_are_float32_and_sum_to_one():
    model, params = case("rwkv4")
    past = np.broadcast_to(TOKENS[:5], (256, 5))
    tokens_BT = np.concatenate([past, np.arange(256)[:, None]], axis=1)
    loglik_BT, _ = log_likelihoods(model.clone(dtype="bfloat16"), params, tokens_BT)
    assert loglik_BT.dtype == jnp.float32
    assert np.exp(np.asarray(loglik_BT[:, -1], np.float64)).sum() == pytest.approx(1, abs=1e-4)


@KINDS
def test_masks_are_aligned_with_the_inputs(kind):
    text = TOKENS[1:24]
    padded = np.concatenate([text[:4], [9, 9, 9], text[4:20]])
    reset_BT, valid_BT = np.zeros((2, 22), bool), np.ones((2, 22), bool)
    reset_BT[0, 7] = True
    valid_BT[1, 4:7] = False
    (reset, invalid), _ = log_likelihoods(*case(kind), np.stack([text, padded]), reset_BT=reset_BT, valid_BT=valid_BT)
    assert alike(-reset, np.concatenate([alone(kind, text[:8]), alone(kind, text[7:])]))
    expected = alone(kind, text[:20])  # entry 3 of the padded text has padding for its target
    assert alike(-invalid[:3], expected[:3]) and alike(-invalid[7:], expected[4:])


@KINDS
def test_state_continues_a_text(kind):
    model, params = case(kind)
    first, state = log_likelihoods(model, params, TOKENS[None, :76], model.init_state(1, 151))
    second, _ = log_likelihoods(model, params, TOKENS[None, 75:], state)
    assert alike(-np.concatenate([first[0], second[0]]), alone(kind, TOKENS))


# ------------------------------------------------------------------------------------------------ protocols


def check_stream(nats, expected):
    assert nats.dtype == np.float32 and np.isnan(nats[0])
    assert alike(nats[1:], expected)


@KINDS
def test_windows_are_windows_alone(kind, compilations):
    expected = [alone(kind, TOKENS[begin : begin + SEQ_LEN + 1]) for begin in range(0, 150, SEQ_LEN)]
    check_stream(evaluate.windows(*case(kind), TOKENS, SEQ_LEN, 4), np.concatenate(expected))
    assert compilations() == 1


@pytest.mark.parametrize(("seq_len", "batch_size"), [(15, 1), (16, 4)])
def test_sliding_is_each_token_from_its_window_and_document_alone(seq_len, batch_size, compilations):
    expected, stride = [], (seq_len + 1) // 2
    for newest in range(150):
        window = next(
            begin
            for begin in range(0, 150, stride)
            if begin <= newest < begin + seq_len and (begin == 0 or newest >= begin + seq_len - stride)
        )
        oldest = max(window, max(start for start in STARTS if start <= newest))
        assert newest + 1 - oldest >= seq_len / 2 or oldest in STARTS
        expected.append(alone("transformer", TOKENS[oldest : newest + 2])[-1])
    check_stream(evaluate.sliding(*case("transformer"), TOKENS, STARTS, seq_len, batch_size), expected)
    assert compilations() == 1


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_carried_is_each_document_alone(batch_size, compilations):
    expected = [alone("rwkv4", TOKENS[start : end + 1]) for start, end in zip(STARTS, ENDS, strict=True)]
    nats = evaluate.carried(*case("rwkv4"), TOKENS, STARTS, SEQ_LEN, batch_size)
    check_stream(nats, np.concatenate(expected))
    assert compilations() == 1


def test_best_practice_follows_the_layers():
    for kind, protocol in (("rwkv4", evaluate.carried), ("transformer", evaluate.sliding)):
        arguments = (*case(kind), TOKENS, STARTS, SEQ_LEN, 3)
        np.testing.assert_array_equal(evaluate.best_practice(*arguments), protocol(*arguments))
    hybrid = rwkv_jax.build("rwkv4", layers=("rwkv4", "attention"), **FIELDS)
    with pytest.raises(ValueError, match="expected none of attention"):
        evaluate.carried(hybrid, {}, TOKENS, STARTS, SEQ_LEN, 3)


def test_rows_are_balanced():
    lengths = np.array([5, 9, 1, 4, 4, 1, 8])
    rows = evaluate._balanced(lengths, 3)
    assert sorted(document for row in rows for document in row) == list(range(7))
    assert max(lengths[row].sum() for row in rows) <= 12  # 32 tokens in 3 rows


def test_protocols_refuse_what_they_cannot_score():
    with pytest.raises(ValueError, match="1 tokens, expected at least 2"):
        evaluate.windows(*case("rwkv4"), TOKENS[:1], SEQ_LEN, 4)
    with pytest.raises(ValueError, match="seq_len is 0"):
        evaluate.windows(*case("rwkv4"), TOKENS, 0, 4)
    with pytest.raises(ValueError, match="token 256 is outside the model's vocabulary of 256"):
        evaluate.windows(*case("rwkv4"), np.array([0, 256]), SEQ_LEN, 4)
    with pytest.raises(ValueError, match="token 0 at every start"):
        evaluate.best_practice(*case("rwkv4"), TOKENS, STARTS + 1, SEQ_LEN, 4)


# ------------------------------------------------------------------------------------------------ reductions


def test_reductions_by_hand():
    assert evaluate.perplexity(np.log([2.0, 8.0])) == pytest.approx(4)
    assert evaluate.bits_per_byte(np.log([2.0, 8.0]), 2) == pytest.approx(2)
    nats = np.array([np.nan, 1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_allclose(evaluate.loss_by_position(nats, 3), [(1 + 4 + 7) / 3, (2 + 5) / 2, (3 + 6) / 2])
    with pytest.raises(ValueError, match="7 predictions do not fill a window of 8"):
        evaluate.loss_by_position(nats, 8)


def test_per_document_leaves_the_separators_out():
    split = Split(np.zeros(9, np.uint8), np.array([0, 4, 5]), ("a", "empty", "b"), 6)
    nats, num_bytes = evaluate.per_document(np.array([np.nan, 1, 2, 3, 100, 200, 4, 5, 6]), split)
    np.testing.assert_array_equal(nats, [6, 0, 15])
    np.testing.assert_array_equal(num_bytes, [3, 0, 3])
    with pytest.raises(ValueError, match="8 nats for a split of 9"):
        evaluate.per_document(np.zeros(8), split)


def test_paired_difference_is_a_bootstrap_over_documents():
    rng = np.random.default_rng(3)
    documents, length = 200, 51
    starts = np.arange(documents) * length
    split = Split(np.zeros(documents * length, np.uint8), starts, ("",) * documents, documents * (length - 1))
    hard = rng.exponential(2, documents * length)
    shift = np.repeat(rng.normal(0.05, 0.1, documents), length)  # as large for all tokens of a document
    a, b = hard + shift, hard.copy()
    a[0] = b[0] = np.nan

    difference, low, high = evaluate.paired_difference(a, b, split, seed=4)
    bits = evaluate.per_document(a, split)[0] / np.log(2) / (length - 1)
    bits -= evaluate.per_document(b, split)[0] / np.log(2) / (length - 1)
    assert difference == pytest.approx(bits.mean())
    standard_error = bits.std() / np.sqrt(documents)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.08)
    assert (high + low) / 2 == pytest.approx(difference, abs=0.2 * standard_error)

    assert evaluate.paired_difference(b, a, split, seed=4)[0] == pytest.approx(-difference)
    assert evaluate.paired_difference(a, b, split, seed=4) == (difference, low, high)
    # documents of different lengths, the same difference in all their tokens: nothing varies
    uneven = split._replace(starts=np.array([0, 51, 400, 5000]), num_bytes=documents * length - 4)
    assert evaluate.paired_difference(hard + 1, hard, uneven) == pytest.approx([1 / np.log(2)] * 3)
    one = split._replace(starts=starts[:1], num_bytes=documents * length - 1)
    assert np.isnan(evaluate.paired_difference(a, b, one)[1:]).all()


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Training runs of both models, in folders of their names."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("rwkv4", "transformer"):
        checkpoint.save(folder / kind / "checkpoints", 3, {"params": case(kind)[1]})
        config = {"model": {"name": kind} | FIELDS, "tokenizer": "bytes", "seq_len": SEQ_LEN}
        (folder / kind / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(bytes(range(256)) + "Käse 日本\n".encode() * 3)
    return path


@KINDS
def test_command_line(kind, workdir, text, capsys):
    argv = [f"--model={workdir / kind}", f"--data={text}", "--batch_size=4"]
    assert evaluate.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = np.frombuffer(b"\0" + text.read_bytes(), np.uint8)
    windows = evaluate.windows(*case(kind), tokens, SEQ_LEN, 4)[1:]
    best = evaluate.best_practice(*case(kind), tokens, np.array([0]), SEQ_LEN, 4)[1:]
    assert report["tokens"] == report["bytes"] == len(tokens) - 1
    assert report["windows"]["bits_per_byte"] == pytest.approx(windows.mean() / np.log(2))
    assert report["best_practice"]["bits_per_byte"] == pytest.approx(best.mean() / np.log(2))
    assert report["best_practice"]["perplexity"] == pytest.approx(np.exp(best.mean()))
    assert report["best_practice_is"] == {"rwkv4": "carried", "transformer": "sliding"}[kind]

    assert evaluate.main([*argv, "--max_tokens=40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{text}: 40 tokens, 40 bytes"
    assert float(lines[1].split()[1]) == pytest.approx(windows[:40].mean() / np.log(2), abs=1e-4)
    assert float(lines[2].split()[1]) == pytest.approx(best[:40].mean() / np.log(2), abs=1e-4)


def test_bytes_of_the_text_are_counted_where_a_token_is_more_than_one(tmp_path):
    text = "Käse und Käse und Käse\n"
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [text], tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    library.save(str(tmp_path / "bpe.json"))
    (tmp_path / "text.txt").write_text(text)
    tokenizer = get_tokenizer(str(tmp_path / "bpe.json"))
    whole = evaluate._held_out(str(tmp_path / "text.txt"), tokenizer, None)
    assert whole.num_bytes == len(text.encode()) > len(whole.tokens)
    part = evaluate._held_out(str(tmp_path / "text.txt"), tokenizer, 2)
    assert part.tokens.tolist() == [0, *tokenizer.encode(text)[:2]]
    assert part.num_bytes == len(tokenizer.decode(part.tokens[1:]).encode())


def test_bytes_are_those_of_the_file_where_the_tokenizer_normalises(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.save(str(tmp_path / "nfkc.json"))
    (tmp_path / "text.txt").write_text("\uff41\uff42" * 10)  # full-width a and b, 3 bytes each
    split = evaluate._held_out(str(tmp_path / "text.txt"), get_tokenizer(str(tmp_path / "nfkc.json")), None)
    assert split.num_bytes == 60 and len(split.tokens) == 21


def test_command_line_says_what_is_wrong_in_one_line(workdir, text, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"K\xe4se")
    for size in (10, 300):
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
        library.save(str(tmp_path / f"{size}.json"))
    good = {"model": workdir / "rwkv4", "data": text}
    for change, message in (
        ({"model": tmp_path / "none.pth"}, "none.pth: no such file"),
        ({"model": tmp_path}, "config.json"),
        ({"data": tmp_path / "none.txt"}, "No such file"),
        ({"data": tmp_path / "empty.txt"}, "empty.txt is empty"),
        ({"data": tmp_path / "latin.txt", "tokenizer": tmp_path / "10.json"}, "latin.txt is not UTF-8"),
        ({"tokenizer": tmp_path / "300.json"}, "has 300 tokens, the model only 256"),
        ({"tokenizer": tmp_path / "none.json"}, "none.json"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seq_len": -1}, "seq_len is -1"),
    ):
        assert evaluate.main([f"--{name}={value}" for name, value in (good | change).items()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_command_line_warns_of_nothing(workdir, text):
    argv = [f"--model={workdir / 'rwkv4'}", f"--data={text}"]
    command = [sys.executable, "-W", "error", "-m", "rwkv_jax.evaluate", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("bits/byte") == 2
