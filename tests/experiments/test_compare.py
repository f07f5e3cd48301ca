"""The comparison: n-gram and xz baselines by definition, and the whole command once, small."""

import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import measures
from experiments.compare import baselines, run, table
from rwkv_jax import data

ROOT = Path(__file__).parents[2]


def _witten_bell(train, context, x, order):
    """The definition, by counting strings."""
    if order == 0:
        return 1 / 256
    context = context[len(context) - (order - 1) :] if order > 1 else b""
    after = [row[i + len(context)] for row in train for i in range(len(row) - len(context))
             if row[i : i + len(context)] == context]  # fmt: skip
    lower = _witten_bell(train, context[1:], x, order - 1) if order > 1 else 1 / 256
    if not after:
        return lower
    types = len(set(after))
    return (after.count(x) + types * lower) / (len(after) + types)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_ngram_bits_are_witten_bell_by_definition(order):
    rng = np.random.default_rng(0)
    train = [bytes(rng.integers(97, 101, 40)) for _ in range(3)]
    test = bytes(rng.integers(97, 103, 60))
    bits = baselines.ngram_bits(np.array([list(r) for r in train], np.uint8), np.array(list(test), np.uint8), order)[
        -1
    ]
    for t, x in enumerate(test):
        context = test[max(0, t - order + 1) : t]
        expected = _witten_bell(train, context, x, min(order, t + 1))
        assert bits[t] == pytest.approx(-math.log2(expected), rel=1e-9)


def test_ngram_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 5, (4, 50)).astype(np.uint8)
    stream = np.concatenate([[0, 1, 2, 3, x] for x in range(256)]).astype(np.uint8)
    bits = baselines.ngram_bits(train, stream, 3)[-1]
    assert np.sum(2 ** -bits[4::5]) == pytest.approx(1, rel=1e-9)


def test_xz_bits_count_the_bytes_that_test_text_adds():
    train, test = b"the quick brown fox " * 50, b"the quick brown fox " * 5
    assert baselines.xz_bits_per_byte(train, test) < 8 * len(lzma.compress(test)) / len(test) / 2


def test_capped_text_is_the_beginning_of_every_document():
    documents = [b"\0" + bytes([65 + i]) * n for i, n in enumerate((500, 3, 40, 500))]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    split = data.Split(np.frombuffer(b"".join(documents), np.uint8), starts, ("a", "b", "c", "d"), 1043)
    short = measures.capped(split, 256)
    lengths = np.diff(short.starts, append=len(short.tokens))
    assert lengths.tolist() == [105, 4, 41, 105] and short.num_bytes == 255 - 4
    assert all(short.tokens[start] == 0 for start in short.starts)
    assert measures.capped(split, 10_000).tokens.tolist() == split.tokens.tolist()


def _compare(*args):
    command = [sys.executable, "-W", "error", "-m", "experiments.compare.run", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_compare_smoke_writes_the_table_the_json_and_the_figure(tmp_path):
    done = _compare("--smoke", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["arms"]) == {"rwkv4", "transformer", "transformer+shift"}
    assert {"command", "commit", "versions", "date", "cores"} <= results["stamp"].keys()
    for arm in results["arms"].values():
        assert arm["curve"][-1][0] == results["preset"]["tokens"]
        assert 0 < arm["share_of_peak"] < 1.5
    rwkv4, transformer = results["arms"]["rwkv4"], results["arms"]["transformer"]
    assert len({d["state_bytes"] for d in rwkv4["decode"]}) == 1
    assert transformer["decode"][-1]["state_bytes"] > transformer["decode"][0]["state_bytes"]
    assert table.render(results) in done.stdout
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--text=/nowhere"], "/nowhere"),
        (["--duration=0"], "duration is 0, expected minutes above 0"),
        (["--duration=nan"], "duration is nan, expected minutes above 0"),
        (["--seed=-1"], "seed is -1, expected 0 to 2^32 - 1"),
    ],
)
def test_compare_reports_a_mistake_in_one_line(args, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main([*args, f"--out={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert expected in err.splitlines()[-1] and out == ""
    assert not list(tmp_path.iterdir())
