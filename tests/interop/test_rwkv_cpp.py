"""rwkv.cpp files, byte by byte."""

import struct

import numpy as np
import pytest
from weights import assert_same_tensors, official, one_line

from rwkv_jax.interop import rwkv_cpp


def test_rwkv_cpp_file_has_the_documented_layout(tmp_path):
    tensors = {
        "emb.weight": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
        "blocks.0.att.time_decay": np.array([-2, 3], np.float32),
        "blocks.0.att.time_mix_k": np.array([[[0.25, 0.5]]], np.float32),
        "head.weight": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
    }
    for half, letter in ((0, "f"), (1, "e")):
        dtype = np.dtype(f"<{letter}")
        stored = tensors | {name: tensors[name].astype(dtype) for name in ("emb.weight", "head.weight")}
        expected = struct.pack("<6i", 0x67676D66, 101, 3, 2, 1, half)
        expected += struct.pack("<5i", 2, 10, half, 2, 3) + b"emb.weight" + struct.pack(f"<6{letter}", *range(1, 7))
        expected += struct.pack("<4i", 1, 23, 0, 2) + b"blocks.0.att.time_decay"
        expected += np.array([-np.exp(-2.0), -np.exp(3.0)], "<f4").tobytes()
        expected += struct.pack("<4i", 1, 23, 0, 2) + b"blocks.0.att.time_mix_k" + struct.pack("<2f", 0.25, 0.5)
        expected += struct.pack("<5i", 2, 11, half, 2, 3) + b"head.weight" + struct.pack(f"<6{letter}", *range(1, 7))
        rwkv_cpp.write(tmp_path / "m", stored)
        assert (tmp_path / "m").read_bytes() == expected
        for version in (100, 101):
            (tmp_path / "m").write_bytes(expected[:4] + struct.pack("<i", version) + expected[8:])
            assert_same_tensors(rwkv_cpp.read(tmp_path / "m"), stored)


@pytest.mark.parametrize(
    "name, number, message",
    [
        ("blocks.0.att.key.weight", 1e5, "m: blocks.0.att.key.weight holds 100000, and the largest float16 is 65504"),
        (
            "blocks.0.att.time_decay",
            100,
            r"m: blocks.0.att.time_decay holds -2.68\d*e\+43",
        ),
        ("blocks.0.att.time_decay", -110, "m: blocks.0.att.time_decay is too slow: .* becomes 0"),
    ],
)
def test_rwkv_cpp_refuses_numbers_that_its_dtypes_cannot_hold(tmp_path, name, number, message):
    tensors = official()
    tensors["head.weight"] = tensors["head.weight"].astype(np.float16)  # and so is every matrix in the file
    rwkv_cpp.write(tmp_path / "m", tensors)
    before = (tmp_path / "m").read_bytes()
    tensors[name] = np.full_like(tensors[name], number)
    with one_line(message):
        rwkv_cpp.write(tmp_path / "m", tensors)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
