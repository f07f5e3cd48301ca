"""Damaged and hostile files of every format: an error of one line, never a crash, a hang or a large allocation."""

import contextlib
import functools
import json
import resource
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import made

import rwkv_jax
from rwkv_jax.interop import huggingface, pth, rwkv_cpp, safetensors_file

FILES = {"pth": "m.pth", "safetensors": "m.safetensors", "huggingface": "m/model.safetensors", "rwkv.cpp": "m.bin"}
FILES |= {"config": "m/config.json", "index": "m/model.safetensors.index.json"}
FOLDERS = ("huggingface", "config", "index")


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@functools.cache
def valid(format):
    """The bytes of a valid file."""
    model, params = made("rwkv4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILES[format].split("/")[0]
        if format == "index":
            write_index(path)
        else:
            rwkv_jax.save(path, model, params, format="rwkv.cpp" if format == "rwkv.cpp" else None)
        return (Path(folder) / FILES[format]).read_bytes()


def write_index(folder):
    model, params = made("rwkv4")
    rwkv_jax.save(folder, model, params)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = list(safetensors_file.read(folder / "part.safetensors")[0])
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module", params=FILES)
def place(request, tmp_path_factory):
    """(format, file to damage, what to load)"""
    folder = tmp_path_factory.mktemp("damaged")
    if request.param in FOLDERS:
        model, params = made("rwkv4")
        write_index(folder / "m") if request.param == "index" else rwkv_jax.save(folder / "m", model, params)
    path = folder / FILES[request.param]
    return request.param, path, path.parent if request.param in FOLDERS else path


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
        with half_a_gigabyte():
            huggingface.read(path) if path.is_dir() else read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        assert "\n" not in text and str(path) in text, text
        assert len(text) < 1000, text
        return text
    return None


def read(path):
    kind = rwkv_jax.interop.files.kind(path)
    found = {"pth": pth.read, "rwkv.cpp": rwkv_cpp.read, "safetensors": lambda p: safetensors_file.read(p)[0]}[kind](
        path
    )
    return {name: x.tobytes() for name, x in found.items()}


def test_a_file_cut_anywhere_is_an_error(place):
    format, path, root = place
    content = valid(format)
    last = len(content.rstrip()) - 1
    for end in [*range(min(last, 400)), *range(400, last, 61), *range(max(last - 60, 0), last)]:
        path.write_bytes(content[:end])
        if load(root) is None:  # between two tensors of an rwkv.cpp file, which does not say how many there are
            with pytest.raises(ValueError, match=r"key '\S+' is missing"):
                rwkv_jax.load(root)
    path.write_bytes(content)
    assert load(root) is None


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_flipped_bytes_are_an_error_or_harmless(place, data):
    format, path, root = place
    content = bytearray(valid(format))
    # Half of the flips hit the first kilobyte, where most headers are.
    ends = st.sampled_from([len(content) - 1, min(1000, len(content) - 1)]).flatmap(lambda n: st.integers(0, n))
    for position, value in data.draw(st.lists(st.tuples(ends, st.integers(0, 255)), min_size=1, max_size=4)):
        content[position] = value
    path.write_bytes(content)
    load(root)


@settings(deadline=None, max_examples=200)
@given(
    content=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\x03\x04", b"fmgg", b"\x40" + bytes(7) + b"{"])
)
def test_any_bytes_are_an_error(tmp_path_factory, start, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(start + content)
    assert load(path) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", ""]) | json_values,
        "shape": st.lists(st.integers(-2, 2**70), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-2, 2**70), min_size=2, max_size=2) | json_values,
    }
)


@settings(deadline=None, max_examples=300)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values) | json_values)
def test_any_header_of_a_safetensors_file_is_an_error_or_harmless(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    load_header = lambda: safetensors_file.read(path)
    try:
        tensors, _ = load_header()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert sum(x.nbytes for x in tensors.values()) == 16


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
        ((2**60).to_bytes(8, "little") + b"{}", "a header of 1,152,921,504,606,846,976 bytes in a file of 10"),
        (safetensors(b"{" + b'"a":[' * 100_000), "its header is no JSON"),
        (safetensors(b'{"a":' + b"[" * 100_000), "its header is no JSON"),
        (safetensors(b'{"a":1,"a":2}'), "a name occurs twice"),
        (safetensors({"a": entry([2**40], 0, 2**42)}), "'a' takes 4,398,046,511,104 bytes"),
        (safetensors({"a": entry([0, 2**62], 0, 0)}, b"1"), r"'a' has shape \[0, 4611686018427387904\]"),
        (safetensors({"a": entry([2**62, 4], 0, 4)}, bytes(4)), r"'a' has shape \[4611686018427387904, 4\]"),
        (safetensors({"a": entry([0, 3], 0, 0)}, b"1"), "tensors of 0 bytes together in 1 bytes"),
        (safetensors({"a": entry([-1], 4, 0)}, bytes(4)), r"'a' has shape \[-1\] and offsets"),
        (safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "tensors of 8 bytes together in 4"),
        (safetensors({"a": entry([1], 4, 8)}, bytes(8)), "tensors of 4 bytes together in 8 bytes"),
        (safetensors({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)), "'a' has dtype 'F8_E4M3', expected one of F64"),
        (safetensors({"__metadata__": {"a": 1}}), "its metadata are not strings"),
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
def test_a_hostile_file_is_named(tmp_path, content, message):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        rwkv_jax.load(tmp_path / "m")
    assert len(one_line(error)) < 1000


@pytest.mark.parametrize(
    "fields, message",
    [
        ("{", "its metadata 'rwkv_jax' are no JSON"),
        ("[" * 100_000, "its metadata 'rwkv_jax' are no JSON"),
        ("7", "its metadata 'rwkv_jax' are no JSON object"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, and there are 2 layers"),
        ({"dim": 10**12}, r"'blocks.0.\S+' has shape|'emb.weight' has shape|fields are not those of a model"),
        ({"vocab_size": 12}, r"'emb.weight' has shape \(11, 8\), expected \(12, 8\)|'head.weight' has"),
        ({"dropout": "much"}, "its fields are not those of a model"),
        ({"layers": ["rwkv4", {}]}, "its fields are not those of a model"),
        ({"layers": 7}, "its fields are not those of a model"),
        ({"embedding_scale": "large"}, "its fields are not those of a model"),
        ({"__class__": "os.system"}, "its fields are not those of a model: unknown model field"),
    ],
)
def test_fields_that_are_no_model_are_refused(tmp_path, fields, message):
    model, params = made("rwkv4")
    rwkv_jax.save(tmp_path / "m.safetensors", model, params)
    tensors, metadata = safetensors_file.read(tmp_path / "m.safetensors")
    text = fields if isinstance(fields, str) else json.dumps(json.loads(metadata["rwkv_jax"]) | fields)
    safetensors_file.write(tmp_path / "m", tensors, {"rwkv_jax": text})
    for scan in (True, False):
        with pytest.raises(ValueError, match=message) as error:
            rwkv_jax.load(tmp_path / "m", scan=scan)
        one_line(error)
