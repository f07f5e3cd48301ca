"""rwkv.cpp files, byte by byte, and their logits in that runtime."""

import math
import os
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from small import forward
from weights import assert_same_params, assert_same_tensors, official, one_line, tiny, trained

import rwkv_jax
from rwkv_jax import interop
from rwkv_jax.interop import formats, rwkv_cpp

TABLE = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
SMALL = np.array([[0.25, 0.5]], np.float32)
# Of each version: (name, official tensor, stored tensor, whether it is float16 in an FP16 file)
ROWS = {
    "rwkv4": [
        ("att.time_decay", np.float32([-2, 3]), np.float32([-math.exp(-2), -math.exp(3)]), False),
        ("att.time_mix_k", SMALL[None], SMALL[0], False),
    ],
    "rwkv5": [
        ("att.time_mix_g", SMALL[None], SMALL[0], False),
        ("att.time_decay", np.float32([[1, 2]]), np.exp(-np.exp([[[1.0], [2]]])).astype(np.float32), False),
        ("att.time_faaaa", SMALL, SMALL[..., None], False),
        ("att.receptance.weight", TABLE[:2], TABLE[:2], True),
        ("att.gate.weight", TABLE[:2], TABLE[:2], True),
        ("att.ln_x.weight", SMALL[0], SMALL[0], False),
    ],
    "rwkv6": [
        ("att.time_maa_x", SMALL[None], SMALL[0], False),
        ("att.time_maa_w1", TABLE.T, TABLE, False),
        ("att.time_maa_w2", np.stack([TABLE] * 5), np.stack([TABLE.T] * 5), False),
        ("att.time_decay", SMALL[None], SMALL[..., None], False),
        ("att.time_decay_w2", TABLE, TABLE.T, False),
        ("att.time_faaaa", SMALL, SMALL[..., None], False),
        ("ffn.time_maa_k", SMALL[None], SMALL[0], False),
    ],
    "rwkv7": [
        ("att.r_k", SMALL, SMALL, False),
        *((f"att.x_{c}", i + SMALL[None], i + SMALL[None], False) for i, c in enumerate("rwkvag")),
        ("att.w0", SMALL[None], SMALL[None], False),
        ("att.w1", TABLE.T, TABLE, True),
        ("att.g2", TABLE, TABLE.T, True),
        ("ffn.x_k", SMALL[None], SMALL[None], False),
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_rwkv_cpp_write_has_the_documented_layout(tmp_path, kind):
    table = ("emb.weight", TABLE, TABLE, True)
    rows = [table, *((f"blocks.0.{name}", *rest) for name, *rest in ROWS[kind]), ("head.weight", *table[1:])]
    for half in (0, 1):
        dtypes = {name: np.dtype("<f2" if half and narrows else "<f4") for name, _, _, narrows in rows}
        tensors = {name: x.astype(dtypes[name]) for name, x, _, _ in rows}
        expected = struct.pack("<6i", 0x67676D66, 101, 3, 2, 1, half)
        mixes = [stored for name, _, stored, _ in rows if ".att.x_" in name]
        for name, _, stored, narrows in rows:
            if ".att.x_" in name:
                if not name.endswith("x_r"):
                    continue
                name, stored = "blocks.0.att.x_rwkvag", np.concatenate(mixes)
            expected += struct.pack("<3i", stored.ndim, len(name), half and narrows)
            expected += struct.pack(f"<{stored.ndim}i", *stored.shape[::-1]) + name.encode()
            expected += stored.astype("<f2" if half and narrows else "<f4").tobytes()
        rwkv_cpp.write(tmp_path / "m", tensors, 1e-5 if kind == "rwkv5" else 64e-5)
        assert (tmp_path / "m").read_bytes() == expected
        for version in (100, 101):
            (tmp_path / "m").write_bytes(expected[:4] + struct.pack("<i", version) + expected[8:])
            assert_same_tensors(rwkv_cpp.read(tmp_path / "m"), tensors)


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
def test_rwkv_cpp_write_refuses_numbers_that_its_dtypes_cannot_hold(tmp_path, name, number, message):
    tensors = official()
    tensors["head.weight"] = tensors["head.weight"].astype(np.float16)  # makes every matrix in the file float16
    rwkv_cpp.write(tmp_path / "m", tensors)
    before = (tmp_path / "m").read_bytes()
    tensors[name] = np.full_like(tensors[name], number)
    with one_line(message):
        rwkv_cpp.write(tmp_path / "m", tensors)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_rwkv_cpp_keeps_decays_of_rwkv5_that_float32_rounds_to_0_and_1(tmp_path):
    model, params = tiny(kind="rwkv5", head_norm_epsilon=1e-5)
    decays = np.float32([-30, -18, -17, -6, 0, 4.5, 4.65, 50] * 2)
    replaced = lambda path, x: decays.reshape(x.shape) if path[-1].key == "time_decay" else x
    params = jax.tree.map_with_path(replaced, params)
    rwkv_jax.save(tmp_path / "once", model, params, format="rwkv.cpp")
    again = rwkv_jax.load(tmp_path / "once")
    rwkv_jax.save(tmp_path / "twice", *again, format="rwkv.cpp")
    assert_same_tensors(tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice"))
    found = np.ravel(again[1]["blocks"]["att"]["time_decay"])
    assert np.isfinite(found).all() and np.abs(found - decays)[3:6].max() < 1e-4


def test_rwkv_cpp_keeps_the_decays_of_an_rwkv5_file_bit_exactly(tmp_path):
    rwkv_jax.save(tmp_path / "m", *tiny(kind="rwkv5", head_norm_epsilon=1e-5), format="rwkv.cpp")
    content, decays = (
        (tmp_path / "m").read_bytes(),
        np.float32([1e-30, 0.003, 0.05, 0.13, 0.21, 0.6, 0.9973, 1 - 2**-24]),
    )
    before = tensors_of(tmp_path / "m")["blocks.0.att.time_decay"].tobytes()
    (tmp_path / "m").write_bytes(content.replace(before, decays.tobytes()))
    rwkv_jax.save(tmp_path / "again", *rwkv_jax.load(tmp_path / "m"), format="rwkv.cpp")
    found = tensors_of(tmp_path / "again")["blocks.0.att.time_decay"].ravel()
    assert np.abs(found - decays).max() < 3e-8 and found[4:].tobytes() == decays[4:].tobytes()


def test_rwkv_cpp_read_accepts_one_head_squeezed_by_its_converter(tmp_path):
    """The converter writes [K, 1] in place of [H, K, 1]."""
    tensors, _ = trained("rwkv5")
    wide = lambda x: x.reshape(1, 64) if x.shape == (2, 32) else x
    one_head = {name: wide(x) for name, x in tensors.items()}
    rwkv_cpp.write(tmp_path / "m", one_head, 1e-5)
    content = (tmp_path / "m").read_bytes()
    for name in (b"decay", b"faaaa"):
        squeezed = lambda ndim, *shape, name=name: struct.pack("<3i", ndim, 23, 0) + struct.pack(f"<{ndim}i", *shape)
        for i in range(3):
            tail = b"blocks.%d.att.time_%s" % (i, name)
            assert content.count(squeezed(3, 1, 64, 1) + tail) == 1
            content = content.replace(squeezed(3, 1, 64, 1) + tail, squeezed(2, 1, 64) + tail)
    before = rwkv_jax.load(tmp_path / "m")
    (tmp_path / "m").write_bytes(content)
    model, params = rwkv_jax.load(tmp_path / "m")
    assert model == before[0] and model.head_size == 64
    assert_same_params(params, before[1])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_rwkv_cpp_keeps_the_numbers_of_rwkv5_with_the_released_epsilon(tmp_path, dtype):
    """The runtime has another epsilon, so att.receptance is divided by 8. The judge is the released trainer."""
    tensors, arrays = trained("rwkv5")
    model, params = interop.from_official({name: x.astype(dtype) for name, x in tensors.items()})
    rwkv_jax.save(tmp_path / "m", model, params, format="rwkv.cpp")
    loaded, found = rwkv_jax.load(tmp_path / "m")
    assert (model.head_norm_epsilon, loaded.head_norm_epsilon) == (64e-5, 1e-5)
    tokens_BT = np.int32(arrays["tokens"][0, :, :48])
    logits = lambda model, params: np.asarray(forward(model.clone(matmul_precision="highest"), params, tokens_BT)[0])
    ours, theirs = logits(model, params), logits(loaded, found)
    assert np.abs(ours - logits(loaded, params)).max() > 1e-3  # the epsilon matters
    np.testing.assert_allclose(theirs, ours, atol=5e-6)
    if dtype == "float32":
        np.testing.assert_allclose(theirs, arrays["logits_after"], atol=5e-6)
    receptance = lambda tree: np.asarray(tree["blocks"]["att"]["receptance"]["kernel"], np.float32)
    np.testing.assert_array_equal(8 * receptance(found), receptance(params))


# ---- rwkv.cpp's own tiny models, trained, and the logits that its tests expect

CLONE = Path(os.environ.get("RWKV_CPP", "absent")) / "tests"
needs_clone = pytest.mark.skipif(not CLONE.is_dir(), reason="RWKV_CPP names no clone of github.com/RWKV/rwkv.cpp")
PROMPT = [[34, 105, 110]]


def next_logits(model, params):
    return np.asarray(forward(model.clone(matmul_precision="highest"), params, np.int32(PROMPT))[0][0, -1])


def expected_logits(version):
    return np.fromfile(CLONE / f"expected-logits-{version}.bin", "<f4")


@pytest.mark.live
@needs_clone
@pytest.mark.parametrize(
    ("version", "epsilon", "error"), [("4v0-660K", 64e-5, 5e-6), ("5v2-730K", 1e-5, 5e-6), ("7v0-834K", 64e-5, 1e-6)]
)
def test_rwkv_cpp_tiny_models_have_its_logits_and_survive_the_round_trip(tmp_path, x64, version, epsilon, error):
    """Computed in float64. Attention moves the logits of 7v0 by 0.011 in all, hence its small error."""
    model, params = rwkv_jax.load(CLONE / f"tiny-rwkv-{version}-FP32.bin", dtype="float64")
    assert model.head_norm_epsilon == epsilon
    assert np.abs(next_logits(model, params) - expected_logits(version)).max() < error
    for precision in ("FP32", "FP16"):
        path = CLONE / f"tiny-rwkv-{version}-{precision}.bin"
        rwkv_jax.save(tmp_path / "m", *rwkv_jax.load(path), format="rwkv.cpp")
        assert_same_tensors(tensors_of(tmp_path / "m"), tensors_of(path))


@pytest.mark.live
@needs_clone
def test_rwkv_cpp_tiny_rwkv6_has_its_logits_within_quantisation(tmp_path):
    """Every clone has the file quantised to 5 bits; the float files are not in all of them."""
    with one_line(r"it is quantised \(Q5_1\)"):
        rwkv_jax.load(CLONE / "tiny-rwkv-6v0-3m-Q5_1.bin")
    content = (CLONE / "tiny-rwkv-6v0-3m-Q5_1.bin").read_bytes()
    floats, position = content[:20] + bytes(4), 24
    while position < len(content):
        ndim, length, dtype = struct.unpack_from("<3i", content, position)
        start = position + 12 + 4 * ndim + length
        size = math.prod(struct.unpack_from(f"<{ndim}i", content, position + 12))
        end = start + (4 * size if dtype == 0 else size // 32 * 24)
        floats += struct.pack("<3i", ndim, length, 0) + content[position + 12 : start]
        floats += content[start:end] if dtype == 0 else dequantised(content[start:end]).tobytes()
        position = end
    (tmp_path / "m").write_bytes(floats)
    model, params = rwkv_jax.load(tmp_path / "m")
    assert (model.layers, model.head_size, model.low_ranks, model.hidden_dim) == (("rwkv6",), 8, (32, 64), 448)
    found, expected = next_logits(model, params), expected_logits("6v0-3m")
    assert np.corrcoef(found, expected)[0, 1] > 0.99999 and np.abs(found - expected).max() < 0.1
    rwkv_jax.save(tmp_path / "again", model, params, format="rwkv.cpp")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "m"))


def dequantised(blocks):
    """Blocks of 32 numbers: scale and offset in float16, 32 fifth bits, and 16 bytes of two numbers' lower bits."""
    rows = np.frombuffer(blocks, np.dtype([("scale", "<f2"), ("low", "<f2"), ("fifth", "<u4"), ("bits", "u1", 16)]))
    four = np.concatenate([rows["bits"] & 15, rows["bits"] >> 4], axis=1)
    fifth = (rows["fifth"][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return (rows["scale"][:, None] * np.float32(four + 16 * fifth) + rows["low"][:, None]).astype(np.float32)


def tensors_of(path):
    """The tensors of a file as they are stored, in any order."""
    buffer, position, found = formats.view(path), 24, {}
    while position < len(buffer):
        ndim, length, dtype = struct.unpack_from("<3i", buffer, position)
        shape = struct.unpack_from(f"<{ndim}i", buffer, position + 12)[::-1]
        start = position + 12 + 4 * ndim
        name = buffer[start : start + length].decode()
        found[name] = np.ndarray(shape, "<f2" if dtype else "<f4", buffer, start + length)
        position = start + length + found[name].nbytes
    return found
