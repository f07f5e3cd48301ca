"""Damaged and hostile files of every format: an error of one line, never a crash, a hang or a large allocation."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from damage import FOREIGN, cuts, flips, half_a_gigabyte
from weights import one_line

import rwkv_jax
from rwkv_jax.interop import formats, huggingface, pth, rwkv_cpp, safetensors_file

FILES = {"pth": "m.pth", "safetensors": "m.safetensors", "huggingface": "m/model.safetensors", "rwkv.cpp": "m.bin"}
FILES |= {"config": "m/config.json", "index": "m/model.safetensors.index.json"}
# Tiny tensors of each version, of which every reader takes a few: most bytes of a file are those of its header.
OF_ALL = {"blocks.0.ffn.key.weight": (4, 2), "head.weight": (3, 2)}
OF_LATER = {"blocks.0.att.ln_x.weight": (2,), "blocks.0.att.gate.weight": (2, 2), "blocks.0.att.time_decay": (1, 2)}
OWN = {
    "4": {"blocks.0.att.time_decay": (2,), "blocks.0.att.time_mix_k": (1, 1, 2)},
    "5": OF_LATER | {"blocks.0.att.time_faaaa": (1, 2), "blocks.0.att.receptance.weight": (2, 2)},
    "6": {
        "blocks.0.att.time_maa_x": (1, 1, 2),
        "blocks.0.att.time_faaaa": (1, 2),
        "blocks.0.att.time_maa_w2": (5, 1, 2),
    }
    | {"blocks.0.att.time_decay": (1, 1, 2)},
    "7": {"blocks.0.att.r_k": (1, 2)}
    | {f"blocks.0.att.x_{c}": (1, 1, 2) for c in "rwkvag"}
    | {f"blocks.0.att.{c}1": (2, 1) for c in "wag"},
}
# Which version in which file, and the cuts of it that leave out whole tensors only. rwkv.cpp's header says how many
# layers follow, not how many tensors: it may end after any but the first, and those that tell the version.
CASES = [(file, "4", 0) for file in FILES if file != "rwkv.cpp"] + [
    (file, "7", 0) for file in ("huggingface", "config")
]
CASES += [("rwkv.cpp", "4", 3), ("rwkv.cpp", "5", 4), ("rwkv.cpp", "6", 5), ("rwkv.cpp", "7", 6)]


def tensors(version):
    shapes = {"emb.weight": (3, 2)} | OWN[version] | OF_ALL
    return {name: np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def place(request, tmp_path_factory):
    """(file to damage, its valid content, path to load, number of cuts that leave out whole tensors only)"""
    name, version, whole_tensors = request.param
    folder, held = tmp_path_factory.mktemp("damaged"), tensors(version)
    path = folder / FILES[name]
    if name == "pth":
        path.write_bytes((Path(__file__).parents[1] / "goldens" / "torch.pth").read_bytes())
    elif name == "safetensors":
        safetensors_file.write(path, held, {"format": "pt"})
    elif name == "rwkv.cpp":
        rwkv_cpp.write(path, held)
    else:
        huggingface.write(path.parent, held, 2e-5 if version == "7" else 64e-5)
    if name == "index":
        (path.parent / "model.safetensors").rename(path.parent / "part.safetensors")
        names = list(safetensors_file.read(path.parent / "part.safetensors")[0])
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    return path, path.read_bytes(), folder / FILES[name].split("/")[0], whole_tensors


def error_of(path):
    """None, or the error of reading the file; checks that it is one line with the name of a file.

    Parameters are not built: that takes 100 times as long as reading.
    """
    try:
        read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        assert "\n" not in text and str(path) in text and len(text) < 1000, text
        return text
    return None


def read(path):
    readers = {"pth": pth.read, "rwkv.cpp": rwkv_cpp.read, "safetensors": lambda path: safetensors_file.read(path)[0]}
    found = huggingface.read(path) if path.is_dir() else readers[formats.format_of(path)](path)
    found = huggingface.named_officially(found)[0] if path.is_dir() else found
    return [x.tobytes() for x in found.values()]


def test_read_refuses_a_file_of_any_format_truncated_anywhere(place):
    path, content, root, whole_tensors = place
    incomplete = []
    with half_a_gigabyte():
        for damaged in cuts(content, len(content.rstrip()) - 1):
            path.write_bytes(damaged)
            if error_of(root) is None:
                incomplete.append(damaged)
        path.write_bytes(content)
        assert error_of(root) is None
    assert len(incomplete) <= whole_tensors
    for damaged in incomplete:
        path.write_bytes(damaged)
        with one_line(r"key '\S+' is missing|is not among the \d+ keys"):
            rwkv_jax.load(root)


def test_read_refuses_or_survives_flipped_bytes(place):
    path, content, root, _ = place
    found = 0
    with half_a_gigabyte():
        for damaged in flips(content, 300):
            path.write_bytes(damaged)
            found += error_of(root) is not None
    assert found > 30


def test_load_refuses_a_pipe_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "m.pth")
    with one_line(r"m.pth: a pipe or device, and weights are mapped into memory; expected a file"):
        rwkv_jax.load(tmp_path / "m.pth")


def safetensors(header, numbers=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(shape, begin, end, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def cpp(*tensors, V=3, D=2, L=1, dtype=0, version=101):
    return struct.pack("<6i", 0x67676D66, version, V, D, L, dtype) + b"".join(tensors)


def cpp_tensor(name, shape, numbers=b"", dtype=0):
    return struct.pack(f"<{3 + len(shape)}i", len(shape), len(name), dtype, *shape[::-1]) + name + numbers


EMB = cpp_tensor(b"emb.weight", (3, 2), bytes(24))
LN_X = cpp_tensor(b"blocks.0.att.ln_x.weight", (2,), bytes(8))
GATE = cpp_tensor(b"blocks.0.att.gate.weight", (2, 2), bytes(16))
R_K = cpp_tensor(b"blocks.0.att.r_k", (1, 2), bytes(8))
HOSTILE = {
    (2**60).to_bytes(8, "little") + b"{}": "truncated or damaged: .* header too large",
    safetensors(entry([2**40], 0, 2**42)): "truncated or damaged: .* file not fully covered",
    safetensors(entry([1], 0, 4, "F\n" * 1000), bytes(4)): "damaged: .* unknown variant",
    safetensors(entry([0, 2**62], 0, 0)): r"damaged: 'a' has shape \[0, 4611686018427387904\]",
    safetensors(entry([4], 0, 4, "F8_E4M3"), bytes(4)): "'a' has dtype F8_E4M3, expected one of F64",
    cpp(version=7): "file version 7, expected 100 or 101",
    cpp(dtype=7): r"it is quantised \(Q5_0\); convert from the FP16 or FP32 file",
    cpp(cpp_tensor(b"a", (2**30, 2**30))): "truncated: 'a' ends at byte 4,611,686,018,427,387,9",
    cpp(cpp_tensor(b"a", (-1,))): r"'a' has shape \(-1,\)",
    cpp(cpp_tensor(b"a", (1,), bytes(4)) * 2): "'a' occurs twice",
    cpp(cpp_tensor(b"\xff", (1,), bytes(4))): "the name of the tensor at byte 24 is not UTF-8",
    cpp(struct.pack("<3i", 1, 2**30, 0)): "1 dimensions and a name of 1073741824 bytes",
    cpp(cpp_tensor(b"a", (32,), bytes(20), 99)): "'a' has data type 99, expected",
    cpp(EMB, V=4): r"V, D, L = \(4, 2, 1\), its tensors \(3, 2, 0\)",
    cpp(EMB, cpp_tensor(b"blocks.0.att.time_decay", (2,), np.float32([-1, 0.5]).tobytes())): "is not negative everyw",
    cpp(EMB, LN_X, GATE, cpp_tensor(b"blocks.0.att.time_decay", (1, 2, 1), np.float32([0.5, 1.5]).tobytes())): (
        "is not from 0 to 1 everywhere"
    ),
    cpp(EMB, LN_X, cpp_tensor(b"blocks.0.att.time_decay", (2, 1, 1), bytes(8))): (
        r"RWKV-5.0 weights \(5.1 in rwkv.cpp's count\); RWKV-4, 5.2, 6 and 7 are supported"
    ),
    cpp(EMB, R_K, cpp_tensor(b"blocks.0.att.x_rwkvag", (5, 1, 2), bytes(40))): "shape .5, 1, 2., expected 6 rows",
    cpp(EMB, R_K, cpp_tensor(b"blocks.0.att.w1", (2,), bytes(8))): "key 'blocks.0.ffn.key.weight' is missing",
}


@pytest.mark.parametrize("content", [*FOREIGN, *HOSTILE], ids=[*FOREIGN.values(), *HOSTILE.values()])
def test_load_names_a_damaged_or_hostile_file(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with one_line(f"{tmp_path / 'm'}: .*{(FOREIGN | HOSTILE)[content]}"), half_a_gigabyte():
        rwkv_jax.load(tmp_path / "m")
