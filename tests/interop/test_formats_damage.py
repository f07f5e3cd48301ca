"""Damaged and hostile files of every format: an error of one line, never a crash, a hang or a large allocation."""

import contextlib
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from weights import one_line

import rwkv_jax
from rwkv_jax.interop import formats, huggingface, pth, rwkv_cpp, safetensors_file

FILES = {"pth": "m.pth", "safetensors": "m.safetensors", "huggingface": "m/model.safetensors", "rwkv.cpp": "m.bin"}
FILES |= {"config": "m/config.json", "index": "m/model.safetensors.index.json"}
# Tiny tensors, of which every reader takes a few: most bytes of a file are those of its header.
SHAPES = {"emb.weight": (3, 2), "blocks.0.att.time_decay": (2,), "blocks.0.att.time_mix_k": (1, 1, 2)}
SHAPES |= {"blocks.0.ffn.key.weight": (4, 2), "head.weight": (3, 2)}
TENSORS = {name: np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in SHAPES.items()}
# A cut between two tensors of an rwkv.cpp file, which does not say how many there are, is found by their names.
INCOMPLETE = r"key '\S+' is missing|is not among the \d keys"


@pytest.fixture(scope="module", params=FILES)
def place(request, tmp_path_factory):
    """(format, file to damage, its valid content, what to load)"""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / FILES[request.param]
    if request.param == "pth":
        pth.write(path, TENSORS)
    elif request.param == "safetensors":
        safetensors_file.write(path, TENSORS, {"format": "pt"})
    elif request.param == "rwkv.cpp":
        rwkv_cpp.write(path, TENSORS)
    else:
        huggingface.write(path.parent, TENSORS)
    if request.param == "index":
        (path.parent / "model.safetensors").rename(path.parent / "part.safetensors")
        names = list(safetensors_file.read(path.parent / "part.safetensors")[0])
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    return request.param, path, path.read_bytes(), folder / FILES[request.param].split("/")[0]


@contextlib.contextmanager
def half_a_gigabyte():
    """No more address space than that: what a hostile size would ask for first."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load(path):
    """None, or the error, of one line and with the name of a file. Parameters are not built: that takes 100 times as
    long as reading."""
    try:
        huggingface.read(path) if path.is_dir() else read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        assert "\n" not in text and str(path) in text, text
        assert len(text) < 1000, text
        return text
    return None


def read(path):
    readers = {"pth": pth.read, "rwkv.cpp": rwkv_cpp.read, "safetensors": lambda path: safetensors_file.read(path)[0]}
    return {name: x.tobytes() for name, x in readers[formats.format_of(path)](path).items()}


def test_damaged_file_cut_anywhere_is_an_error(place):
    format, path, content, root = place
    last = len(content.rstrip()) - 1
    ends = range(last) if last < 600 else [*range(300), *range(300, last, 13), *range(last - 60, last)]
    incomplete = []
    with half_a_gigabyte():
        for end in ends:
            path.write_bytes(content[:end])
            if load(root) is None:
                incomplete.append(end)
        path.write_bytes(content)
        assert load(root) is None
    # The file of rwkv.cpp says how many layers it has: it may end after any tensor of the last one.
    assert len(incomplete) == (3 if format == "rwkv.cpp" else 0)
    for end in incomplete:
        path.write_bytes(content[:end])
        with one_line(INCOMPLETE):
            rwkv_jax.load(root)


many = pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])


@many
def test_damaged_bytes_are_an_error_or_harmless(place, count):
    _, path, content, root = place
    rng = np.random.default_rng(count)
    found = 0
    with half_a_gigabyte():
        for _ in range(count):
            damaged = bytearray(content)
            # Half of the flips hit the first 100 bytes: lengths, magic numbers, the first tensor.
            for last in rng.choice([len(content), min(100, len(content))], rng.integers(1, 5)):
                damaged[rng.integers(last)] = rng.integers(256)
            path.write_bytes(damaged)
            found += load(root) is not None
    assert found > count / 10


@many
def test_damaged_file_of_random_bytes_is_an_error(tmp_path, count):
    rng = np.random.default_rng(count)
    starts = [b"", b"PK\x03\x04", b"fmgg", b"fmgg\x65\0\0\0", b"\x40" + bytes(7) + b"{"]
    with half_a_gigabyte():
        for i in range(count):
            (tmp_path / "any").write_bytes(starts[i % len(starts)] + rng.bytes(rng.integers(200)))
            assert load(tmp_path / "any") is not None


def any_json(rng, depth=0):
    plain = [None, True, 0, -1, 1.5, 2**70, "", "F32", "\u00e9\n"]
    draw = lambda: any_json(rng, depth + 1)
    kind = rng.integers(len(plain) + (2 if depth < 3 else 0))
    if kind < len(plain):
        return plain[kind]
    values = [draw() for _ in range(rng.integers(4))]
    return values if kind == len(plain) else {f"{i}": x for i, x in enumerate(values)}


def any_entry(rng):
    number = lambda: int(rng.choice([0, 1, 2, 4, 16, -1, 2**62]))
    fields = {
        "dtype": ["F32", "F32", "BF16", "F4", ""][rng.integers(5)],
        "shape": [number() for _ in range(rng.integers(3))],
        "data_offsets": [0, 16] if rng.integers(2) else [number(), number()],
    }
    wrong = rng.integers(12)
    if wrong < 3:
        fields[list(fields)[wrong]] = any_json(rng)
    return any_json(rng) if wrong == 3 else fields


@pytest.mark.parametrize("count", [800, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_safetensors_header_is_an_error_or_harmless(tmp_path, count):
    path = tmp_path / "any.safetensors"
    rng = np.random.default_rng(count)
    harmless = 0
    for i in range(count):
        names = rng.choice(["a", "b", "__metadata__"], rng.integers(1, 4), replace=False)
        header = any_json(rng) if i % 8 == 0 else {str(name): any_entry(rng) for name in names}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        try:
            tensors, _ = safetensors_file.read(path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, header
        else:
            assert sum(x.nbytes for x in tensors.values()) == 16, header
            harmless += 1
    assert 0 < harmless < count / 2


def safetensors(header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def cpp(*tensors, V=3, D=2, L=1, dtype=0, version=101):
    return struct.pack("<6i", 0x67676D66, version, V, D, L, dtype) + b"".join(tensors)


def cpp_tensor(name, shape, numbers=b"", dtype=0):
    return struct.pack(f"<{3 + len(shape)}i", len(shape), len(name), dtype, *shape[::-1]) + name + numbers


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch's old format"),
        (b"GGUF\x03\x00\x00\x00", "no weights; expected a .pth, .safetensors or rwkv.cpp file"),
        ((2**60).to_bytes(8, "little") + b"{}", "truncated or damaged: .* header too large"),
        (safetensors(b'{"a":' + b"[" * 100_000), "truncated or damaged: .* recursion limit"),
        (
            safetensors({"a": {"dtype": "F\n" * 1000, "shape": [], "data_offsets": [0, 0]}}),
            "damaged: .* unknown variant",
        ),
        (safetensors({"a": entry([2**40], 0, 2**42)}), "truncated or damaged: .* file not fully covered"),
        (safetensors({"a": entry([0, 2**62], 0, 0)}), r"damaged: 'a' has shape \[0, 4611686018427387904\]"),
        (safetensors({"a": entry([0] * 100, 0, 0)}), r"damaged: 'a' has shape \[0, 0, 0"),
        (safetensors({"a": entry([1], 4, 8)}, bytes(8)), "truncated or damaged: .* invalid offset for tensor `a`"),
        (safetensors({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)), "'a' has dtype F8_E4M3, expected one of F64"),
        (safetensors({"a": entry([1], 0, 4)}, bytes(4)), "no RWKV-4 weights: 'emb.weight' is not among the 1 keys"),
        (cpp(version=7), "file version 7, expected 100 or 101"),
        (cpp(dtype=7), r"it is quantised \(Q5_0\); convert from the FP16 or FP32 file"),
        (cpp(dtype=99), "it has data type 99"),
        (cpp(), "no RWKV-4 weights"),
        (cpp(cpp_tensor(b"a", (2**30, 2**30))), "truncated: 'a' ends at byte 4,611,686,018,427,387,9"),
        (cpp(cpp_tensor(b"a", (-1,))), r"'a' has shape \(-1,\)"),
        (cpp(cpp_tensor(b"a", (1,), bytes(4)) * 2), "'a' occurs twice"),
        (cpp(cpp_tensor(b"\xff", (1,), bytes(4))), "the name of the tensor at byte 24 is no text"),
        (cpp(struct.pack("<3i", 9, 1, 0)), "9 dimensions and a name of 1 bytes"),
        (cpp(struct.pack("<3i", 1, 2**30, 0)), "1 dimensions and a name of 1073741824 bytes"),
        (cpp(cpp_tensor(b"a", (32,), bytes(20), 2)), r"'a' is quantised \(Q4_0\)"),
        (cpp(cpp_tensor(b"emb.weight", (3, 2), bytes(24)), V=4), r"V, D, L = \(4, 2, 1\), its tensors \(3, 2, 0\)"),
        (cpp(cpp_tensor(b"blocks.0.att.ln_x.weight", (1,), bytes(4))), "RWKV-5 weights"),
        (
            cpp(cpp_tensor(b"blocks.0.att.x_rwkvag", (1,), bytes(4)), cpp_tensor(b"blocks.0.att.r_k", (1,), bytes(4))),
            "-7",
        ),
        (
            cpp(
                cpp_tensor(b"emb.weight", (3, 2), bytes(24)),
                cpp_tensor(b"blocks.0.att.time_decay", (1,), np.float32(0.5).tobytes()),
            ),
            r"'blocks.0.att.time_decay' is not negative everywhere",
        ),
    ],
)
def test_damaged_or_hostile_file_is_named(tmp_path, content, message):
    (tmp_path / "m").write_bytes(content)
    with one_line(message):
        rwkv_jax.load(tmp_path / "m")
