"""The `.pth` file format, without torch and judged by torch."""

import base64
import io
import os
import pickle
import zipfile
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import assert_same_tensors, one_line

from rwkv_jax.interop import pth

# ---- the file format

# Written by torch 2.13:
#     state = torch.nn.Linear(2, 3).state_dict()
#     state["weight"] = torch.tensor([[1.5, -2.0], [0.0, 3.25], [-0.5, 8.0]], dtype=torch.bfloat16)
#     state["bias"] = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float16))
#     base = torch.arange(12.0).reshape(3, 4)
#     state["rows"], state["transposed"], state["scalar"] = base[1:], base.T, torch.tensor(7)
#     buffer = io.BytesIO()
#     torch.save(state, buffer)
#     print(base64.b64encode(zlib.compress(buffer.getvalue(), 9)))
TORCH_FILE = zlib.decompress(
    base64.b64decode(
        """
        eNqlVd1v21QUv/mok3pdP7aybmWU7gNIYUttp42TTaydx6xJnrQuCCnaS+QmbmLhxjn2bQtIlSpVLfCKtJdpQjzyzgMPIFH+BF54
        2sOkPUx74k+Ac+3Ws29pC5mVYzvJ/X2c63OOl4xMlpB8nhw6RskZYnrNjr1uzbZMahZ7nzu6NkweJY6tdLPpOo7VpLbb9cUHXsvy
        rNYndpOKQGZqkCrUBSTbsOx2h0K6SV2kLDbWqO34YsOzltdsp9WgVtd3vca6IkKmUKjnEOHjSrNtQTaEiJruuCaVy5+Gv4swUE/h
        MgmEegavzd4a5AyBQv6hQYyMkd6FQSNtpHZB/LbDjJyiMFSD03XMlizbpg/DR3jpmZ65alHLE2Gkg246Bw7umc5KpD4aqMsw1skZ
        GQpnAtUdOGukdmA8VHyLwrkaTHwTfDn/NVyowWQg77kbPryd4A6Si8gvBuQKvIPkQxSmHhpZzCW7C+/iDaY0HQpconC5BlfqIi6m
        ntn1e65vteBqyNy52NnHv8fMZY3MLrxvpBjNByG+QAHPHwYPyG+ajunBRwlX991uOzJ1LTBVgutImqJQRNKZmZBoloJUA3ltE5T6
        IC5q4P6ZrGagFPw/V2cFBfObUA6e7brl+VguoBop3/eXi0tGLr999u87d9OEsFg6signSDkqyuKK662atLHPpmsKV5v/5ZCZ9s9/
        PdtmybE4WnuSqK+198uzYTp2u7tqdamulfqQf1SeYwYWNuAV5k3SxxoYIwuRgeUvqeWyZtO1m/3oHhyOTaljMQ87H7+4wCpBONbD
        MLmVmAqzkq7deAMDewtkD/UWyW/kNnPxxY2tn4ZQZ+gEF5WkC1nX5vpygUS/kkWmTMZPPekjf+XN8g9ZtxbwtIgfjC2MHzD2MJ5j
        kNs4izGmMaRwjzZXbkls9p3gdDzptKRro4ec5vZXM97eny9dRpQ/lneE3Ix4o9ZT+92CksiU//i+/dnJ9T9FlNcNGKTkW56NHfiV
        yd4+Dbula8X/aUSWVLVSVlSlqlarlfk5uazMy2pVVRSpWpXmy9WKqkilSjAmfpze+L2APgqByxQzG/mMj6/RQ8759yiPjg+giQTy
        cZocNfB4kvgQmUwOjgw5ZnLxPPFBMJbg+S7GEw0gHh7v4OEE/FyWcLODx8Z7MIl9ymPlQ7qxruB0BziswmPjlZ/E7vHYEo+N1+5I
        AnteIHyn8OB4SU0l9zoG/vdiXzIE4dpBa2SuR0iRu26nw2sld9DqQnD3y2D4PXzrDQghRgzWh2v/AYIkPWM=
        """
    )
)


def test_pth_of_torch_is_read(tmp_path):
    path = tmp_path / "torch.pth"
    path.write_bytes(TORCH_FILE)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "weight": np.array([[1.5, -2.0], [0.0, 3.25], [-0.5, 8.0]], ml_dtypes.bfloat16),
        "bias": np.array([0.5, -1.0, 2.0], np.float16),
        "rows": rows[1:],
        "transposed": rows.T,
        "scalar": np.array(7),
    }
    tensors = pth.read(path)
    assert_same_tensors(tensors, expected)
    assert tensors["transposed"].strides == (4, 16)


ALL_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def all_kinds():
    rng = np.random.default_rng(1)
    tensors = {name: (rng.normal(size=(3, 5)) * 9).astype(jnp.dtype(name)) for name in ALL_DTYPES}
    tensors["transposed"] = tensors["float32"].T
    tensors["every other"] = tensors["bfloat16"][:, ::2]
    tensors["skálár"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    return tensors


def test_pth_round_trip_is_bit_exact(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, all_kinds())
    assert_same_tensors(pth.read(path), all_kinds())
    assert list(pth.read(path)) == list(all_kinds())
    assert os.listdir(tmp_path) == ["model.pth"]
    pth.write(path, {})
    assert pth.read(path) == {}


def test_pth_arrays_are_aligned_views_of_the_file(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {"x" * n: np.arange(1.0 + n) for n in range(1, 70)})
    starts = [x.ctypes.data % 64 for x in pth.read(path).values()]
    assert starts == [0] * len(starts)
    x = pth.read(path)["x"]
    assert not x.flags.owndata
    assert not x.flags.writeable


class Unreadable:
    dtype, shape, size, ndim = np.dtype("float32"), (2,), 2, 1

    def __array__(self, *args, **kwargs):
        raise OSError("the device is gone")


def test_pth_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {"a": np.ones(3)})
    with pytest.raises(OSError, match="the device is gone"):
        pth.write(path, {"a": np.zeros(3), "b": Unreadable()})
    with pytest.raises(ValueError, match=r"'b' has dtype complex64; a .pth holds float64, float32"):
        pth.write(path, {"a": np.zeros(3), "b": np.zeros(3, np.complex64)})
    assert_same_tensors(pth.read(path), {"a": np.ones(3)})
    assert os.listdir(tmp_path) == ["model.pth"]


def rewritten(tmp_path, records=(), compression=zipfile.ZIP_STORED):
    """A valid file with some records replaced (bytes) or left out (None)."""
    pth.write(tmp_path / "valid.pth", {"a": np.arange(6, dtype=np.float32)})
    records = dict(records)
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(tmp_path / "valid.pth") as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = records.get(name.removeprefix("archive/"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tensor_pickle(*, key=b"0", size=6, offset=0, shape=6, stride=1, name=b"X\x01\x00\x00\x00a"):
    number = lambda n: b"J" + n.to_bytes(4, "little", signed=True)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu"
    view = number(offset) + b"(" + number(shape) + b"t(" + number(stride) + b"t\x89}"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(size) + b"tQ" + view + b"tR"
    return b"\x80\x02}" + name + rebuilt + b"s."


def test_pth_made_by_hand_for_the_tests_below_is_valid(tmp_path):
    path = rewritten(tmp_path, {"data.pkl": tensor_pickle(offset=1, shape=3, stride=2)})
    assert_same_tensors(pth.read(path), {"a": np.array([1, 3, 5], np.float32)})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty file"),
        (b"\n\n<!DOCTYPE html><html>not found</html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch's old format, not a zip"),
        (b"GGUF\x03\x00\x00\x00", "not a zip file"),
    ],
)
def test_pth_that_is_no_zip_is_named(tmp_path, content, message):
    (tmp_path / "model.pth").write_bytes(content)
    with one_line(f"model.pth: {message}"):
        pth.read(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "records, message",
    [
        ({"data.pkl": None}, "a zip file without data.pkl"),
        ({"byteorder": b"big"}, "its byteorder is b'big'; expected b'little'"),
        ({"data/0": None}, "'a' needs record 'data/0', which the file lacks"),
        ({"data/0": bytes(20)}, "'a' needs 6 elements of storage '0'; it has 5"),
        ({"data.pkl": tensor_pickle(shape=7)}, "'a' needs 7 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(offset=1)}, "'a' needs 7 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(stride=2)}, "'a' needs 11 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(size=5)}, "'a' needs 6 elements of storage '0'; it has 5"),
        ({"data.pkl": tensor_pickle(shape=9, size=9)}, "'a' needs 9 elements of storage '0'; it has 6"),
        ({"data.pkl": tensor_pickle(offset=-1)}, "'a' is no strided view of a storage"),
        ({"data.pkl": tensor_pickle(stride=-1, offset=5)}, "'a' is no strided view of a storage"),
        ({"data.pkl": tensor_pickle(key=b"1")}, "'a' needs record 'data/1', which the file lacks"),
        ({"data.pkl": tensor_pickle(name=b"K\x07")}, "key 7 is no string"),
        ({"data.pkl": pickle.dumps({"model": {"a": 1}})}, "'model' holds a dict; expected a flat dict of tensors"),
        ({"data.pkl": pickle.dumps({"step": 7})}, "'step' holds a int; expected a flat dict of tensors"),
        ({"data.pkl": pickle.dumps([1])}, "holds a list; expected a dict of tensors"),
        ({"data.pkl": b""}, "data.pkl is not the pickle of a state dict"),
        (
            {"data.pkl": b"\x80\x02}r\xff\xff\xff\x7f."},
            "it remembers an object as number 2,147,483,647 and has 9 bytes",
        ),
        ({"data.pkl": b"\x80\x02Fa\nb."}, "not the pickle of a state dict: .*'a"),
        ({"data.pkl": b"\x80\x02}q"}, "data.pkl is not the pickle of a state dict"),
    ],
)
def test_pth_without_a_state_dict_is_named(tmp_path, records, message):
    with one_line(message):
        pth.read(rewritten(tmp_path, records))


@pytest.mark.parametrize(
    "value, name",
    [
        (Call(os.mkdir, "canary"), "posix.mkdir"),
        (np.zeros(3), r"numpy._core\S+"),
        (Call(eval, "open('canary', 'w')"), "builtins.eval"),
        (io.BytesIO(b""), "_io.BytesIO"),
    ],
)
def test_pth_refuses_every_other_global_and_runs_nothing(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    for protocol in (3, 4, 5):  # protocol 2 would write Python 2's names
        path = rewritten(tmp_path, {"data.pkl": pickle.dumps({"a": value}, protocol)})
        with one_line(f"asks for '{name}', which no state dict needs; refused"):
            pth.read(path)
    assert not (tmp_path / "canary").exists()


def test_pth_ignores_attributes_in_the_pickle(tmp_path):
    content = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x07sb."
    assert pth.read(rewritten(tmp_path, {"data.pkl": content})) == {}


def test_pth_refuses_compressed_records(tmp_path):
    with one_line(r"record 'archive/data.pkl' is compressed"):
        pth.read(rewritten(tmp_path, compression=zipfile.ZIP_DEFLATED))


def test_pth_truncated_anywhere_is_an_error(tmp_path):
    path = tmp_path / "model.pth"
    for end in range(4, len(TORCH_FILE), 13):
        path.write_bytes(TORCH_FILE[:end])
        with one_line("truncated or damaged zip file"):
            pth.read(path)


def test_pth_with_damaged_bytes_is_an_error_or_harmless(tmp_path):
    path = tmp_path / "model.pth"
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(500):
        damaged = bytearray(TORCH_FILE)
        for position in rng.integers(len(damaged), size=rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            for x in pth.read(path).values():
                x.tobytes()
        except ValueError as error:
            assert str(error).startswith(str(path)), error
            noticed += 1
    assert noticed > 100


# ---- live judges


@pytest.mark.live
@pytest.mark.parametrize("mmap", [True, False])
def test_pth_is_read_by_torch(tmp_path, mmap):
    import torch

    path = tmp_path / "model.pth"
    pth.write(path, all_kinds())
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(all_kinds())
    for name, x in all_kinds().items():
        assert str(loaded[name].dtype) == f"torch.{x.dtype}"
        assert tuple(loaded[name].shape) == x.shape
        assert loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == x.tobytes(), name


@pytest.mark.live
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pth_of_torch_is_read_whatever_its_pickle_protocol(tmp_path, protocol):
    import torch

    path = tmp_path / "model.pth"
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    state = torch.nn.LSTM(3, 5, 2).state_dict()
    for name in ALL_DTYPES:
        state[name] = (base * 9).to(getattr(torch, name))
    state |= {"slice": base[2:5, 1:3], "transposed": base.T, "expanded": base[:1].expand(3, 4)}
    state |= {"parameter": torch.nn.Parameter(base.bfloat16()), "scalar": torch.tensor(3.0)}
    torch.save(state, path, pickle_protocol=protocol)
    tensors = pth.read(path)
    assert list(tensors) == list(state)
    for name, x in state.items():
        x = x.detach()
        assert str(x.dtype) == f"torch.{tensors[name].dtype}"
        assert tensors[name].shape == tuple(x.shape)
        plain = x.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert tensors[name].tobytes() == plain.tobytes(), name


@pytest.mark.live
def test_pth_refuses_old_and_whole_module_files_of_torch(tmp_path):
    import torch

    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch's old format"):
        pth.read(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"'torch.nn.modules.linear.Linear', which no state dict needs; refused"):
        pth.read(path)
    torch.save({"state_dict": {"a": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="'state_dict' holds a dict; expected a flat dict of tensors"):
        pth.read(path)
