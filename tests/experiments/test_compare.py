"""The comparison: n-gram and xz baselines by definition, and one small run of the command."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import measures
from experiments.compare import baselines, run, table
from rwkv_jax import data

ROOT = Path(__file__).parents[2]


def _witten_bell(train, context, x):
    """Probability of x after `context` by the definition of Witten-Bell smoothing, from counts of substrings."""
    n = len(context)
    lower = _witten_bell(train, context[1:], x) if context else 1 / 256
    after = [row[i + n] for row in train for i in range(len(row) - n) if row[i : i + n] == context]
    if not after:
        return lower
    types = len(set(after))
    return (after.count(x) + types * lower) / (len(after) + types)


def test_ngram_bits_follow_the_definition_of_witten_bell():
    rng = np.random.default_rng(0)
    train = [bytes(rng.integers(97, 101, 40)) for _ in range(3)]
    test = bytes(rng.integers(97, 103, 60))
    bits = baselines.ngram_bits(np.array([list(r) for r in train], np.uint8), np.array(list(test), np.uint8), 6)
    for order, bits_T in enumerate(bits, 1):
        expected = [_witten_bell(train, test[max(0, t - order + 1) : t], x) for t, x in enumerate(test)]
        np.testing.assert_allclose(2**-bits_T, expected, rtol=1e-9)


def test_xz_bits_per_byte_counts_the_bytes_that_the_test_text_adds():
    train, test = b"the quick brown fox " * 50, b"the quick brown fox " * 5
    assert baselines.xz_bits_per_byte(train, test) < 8 * len(lzma.compress(test)) / len(test) / 2


def test_capped_keeps_the_beginning_of_every_document():
    documents = [b"\0" + bytes([65 + i]) * n for i, n in enumerate((500, 3, 40, 500))]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    split = data.Split(np.frombuffer(b"".join(documents), np.uint8), starts, ("a", "b", "c", "d"), 1043)
    short = measures.capped(split, 256)
    lengths = np.diff(short.starts, append=len(short.tokens))
    assert lengths.tolist() == [105, 4, 41, 105] and short.num_bytes == 255 - 4
    assert all(short.tokens[start] == 0 for start in short.starts)
    assert measures.capped(split, 10_000).tokens.tolist() == split.tokens.tolist()


def test_difference_is_paired_over_the_documents_that_have_text():
    hard_N = np.random.default_rng(3).exponential(2, 13)
    split = data.Split(np.array([0, 1] * 6 + [0]), np.arange(0, 13, 2), (), 6)  # the last document is empty
    bit = pytest.approx(1 / np.log(2))
    assert run.difference(hard_N + 1, hard_N, split) == {"bits_per_byte": bit, "low": bit, "high": bit}
    few = split._replace(tokens=split.tokens[:11], starts=split.starts[:6], num_bytes=5)  # five, and an empty one
    assert run.difference(hard_N[:11] + 1, hard_N[:11], few) == {"bits_per_byte": bit, "low": None, "high": None}


@pytest.mark.slow
def test_compare_smoke_writes_the_table_the_json_and_the_figure(tmp_path):
    program = [sys.executable, "-W", "error", "-m", "experiments.compare.run", "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["arms"]) == {"rwkv4", "rwkv7", "transformer", "transformer+shift"}
    for arm in results["arms"].values():
        assert arm["curve"][-1][0] == results["preset"]["tokens"]
        assert 0 < arm["share_of_peak"] < 1.5
    sizes = {name: [row["state_bytes"] for row in arm["decode"]] for name, arm in results["arms"].items()}
    assert all(len(set(sizes[name])) == 1 for name in ("rwkv4", "rwkv7"))
    assert sizes["transformer"][-1] > sizes["transformer"][0]
    assert table.render(results) in done.stdout
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--text=/nowhere"], "/nowhere"),
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
