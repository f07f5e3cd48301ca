"""`.npy` files of tokens as corpora."""

import numpy as np
import pytest
from damage import cuts
from texts import splits_of

from rwkv_jax.data import SEPARATOR, prepare


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">u2"])
def test_prepare_reads_an_array_of_tokens(tmp_path, dtype):
    tokens = np.tile(np.array([7, 8, 9, 10, 0]), 60).astype(dtype)
    np.save(tmp_path / "a.npy", tokens)
    corpus = prepare(str(tmp_path / "a.npy"))
    np.testing.assert_array_equal(np.concatenate([split.tokens for split in splits_of(corpus)]), tokens)
    assert isinstance(corpus.train.tokens, np.memmap)
    assert corpus.train.starts.tolist() == [0, *range(4, 270, 5)]
    assert corpus.valid.starts.tolist() == [0, 5, 10] and corpus.valid.tokens[0] == SEPARATOR


def test_prepare_cuts_an_array_without_separators_by_position(tmp_path):
    np.save(tmp_path / "a.npy", np.full(200, 7, np.uint16))
    corpus = prepare(str(tmp_path / "a.npy"))
    assert [len(split.tokens) for split in splits_of(corpus)] == [180, 10, 10]
    assert [split.starts.tolist() for split in splits_of(corpus)] == [[0], [0], [0]]


ARRAYS = {
    "is damaged or not a .npy file": lambda path: path.write_bytes(b"text"),
    "holds float64 [9], expected integers of one dimension": lambda path: np.save(path, np.ones(9)),
    "holds int64 [3, 3], expected integers of one dimension": lambda path: np.save(path, np.ones((3, 3), int)),
    "holds token -1, outside the vocabulary of 256": lambda path: np.save(path, np.full(99, -1)),
    "holds token 256, outside the vocabulary of 256": lambda path: np.save(path, np.full(99, 256)),
    "holds 2 tokens: too few for train, valid and test": lambda path: np.save(path, np.ones(2, int)),
}


@pytest.mark.parametrize("message", ARRAYS)
def test_prepare_refuses_an_array_that_is_not_tokens(tmp_path, message):
    path = tmp_path / "a.npy"
    ARRAYS[message](path)
    with pytest.raises(ValueError) as raised:
        prepare(str(path))
    assert str(raised.value).startswith(f"{path} {message}") and "\n" not in str(raised.value)


HEADER = "{{'descr': '<u2', 'fortran_order': False, 'shape': ({},)}}"


@pytest.mark.parametrize(
    "header",
    ["(" * 5000, "[1" + "+1" * 3000 + "]", HEADER.format("9" * 30), HEADER.format(f"{2**62}, 3")],
    ids=["tokens", "depth", "number", "size"],
)
def test_prepare_refuses_an_npy_header_that_python_cannot_evaluate(tmp_path, header):
    path, content = tmp_path / "a.npy", header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\1\0" + len(content).to_bytes(2, "little") + content)
    with pytest.raises(ValueError, match=r"a\.npy is damaged or not a \.npy file: ") as raised:
        prepare(str(path))
    assert "\n" not in str(raised.value)


def test_prepare_refuses_an_npy_file_truncated_anywhere(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200))
    content = (tmp_path / "a.npy").read_bytes()
    for damaged in cuts(content, len(content) - 1)[::9]:
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.npy is damaged or not a \.npy file"):
            prepare(str(tmp_path / "a.npy"))
