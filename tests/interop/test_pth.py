"""The `.pth` file format, without torch and judged by torch."""

import os
import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import assert_same_tensors, one_line

import rwkv_jax
from rwkv_jax.interop import pth

GOLDEN = Path(__file__).parents[1] / "goldens" / "torch.pth"


def test_pth_read_reads_a_file_of_torch():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "weight": np.array([[1.5, -2.0], [0.0, 3.25], [-0.5, 8.0]], ml_dtypes.bfloat16),
        "bias": np.array([0.5, -1.0, 2.0], np.float16),
        "rows": rows[1:],
        "transposed": rows.T,
        "scalar": np.array(7),
    }
    tensors = pth.read(GOLDEN)
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


def test_pth_read_gives_bit_exact_aligned_views_of_the_file(tmp_path):
    path = tmp_path / "model.pth"
    tensors = all_kinds() | {"x" * n: np.arange(1.0 + n) for n in range(1, 70)}
    pth.write(path, tensors)
    found = pth.read(path)
    assert_same_tensors(found, tensors)
    assert list(found) == list(tensors) and os.listdir(tmp_path) == ["model.pth"]
    assert {found["x" * n].ctypes.data % 64 for n in range(1, 70)} == {0}
    assert not found["x"].flags.owndata and not found["x"].flags.writeable
    pth.write(path, {})
    assert pth.read(path) == {}


class Unreadable:
    dtype, shape, size, ndim = np.dtype("float32"), (2,), 2, 1

    def __array__(self, *args, **kwargs):
        raise OSError("the device is gone")


def test_pth_write_leaves_the_old_file_when_it_fails(tmp_path):
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
    """An object that pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tensor_pickle(*, size=6, offset=0, shape=6, stride=1, name=b"X\x01\x00\x00\x00a"):
    number = lambda n: b"J" + n.to_bytes(4, "little", signed=True)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + b"0" + b"X\x03\x00\x00\x00cpu"
    view = number(offset) + b"(" + number(shape) + b"t(" + number(stride) + b"t\x89}"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(size) + b"tQ" + view + b"tR"
    return b"\x80\x02}" + name + rebuilt + b"s."


def edited(**fields):
    return {"data.pkl": tensor_pickle(**fields)}


@pytest.mark.parametrize(
    "records, message",
    [
        ({"data.pkl": None}, "a zip file without data.pkl"),
        ({"byteorder": b"big"}, "its byteorder is b'big'; expected b'little'"),
        ({"data/0": None}, "'a' needs record 'data/0', which the file lacks"),
        ({"data/0": bytes(20)}, "'a' needs 6 elements of storage '0'; it has 5"),
        (edited(size=5), "'a' needs 6 elements of storage '0'; it has 5"),
        (edited(offset=1), "'a' needs 7 elements of storage '0'; it has 6"),
        (edited(stride=2), "'a' needs 11 elements of storage '0'; it has 6"),
        (edited(stride=-1, offset=5), "'a' is not a strided view of a storage"),
        (edited(name=b"K\x07"), "key 7 is not a string"),
        ({"data.pkl": pickle.dumps({"model": {"a": 1}})}, "'model' holds a dict; expected a flat dict of tensors"),
        ({"data.pkl": pickle.dumps([1])}, "holds a list; expected a dict of tensors"),
        ({"data.pkl": b"\x80\x02}r\xff\xff\xff\x7f."}, "its memo index 2,147,483,647 exceeds its 9 bytes"),
        ({"data.pkl": b"\x80\x02Fa\nb."}, "not the pickle of a state dict: .*'a"),
    ],
)
def test_pth_read_names_a_file_without_a_state_dict(tmp_path, records, message):
    with one_line(message):
        pth.read(rewritten(tmp_path, records))


@pytest.mark.parametrize(
    "value, name",
    [
        (Call(os.mkdir, "canary"), "posix.mkdir"),
        (Call(eval, "open('canary', 'w')"), "builtins.eval"),
        (np.zeros(3), r"numpy._core\S+"),
    ],
)
def test_pth_read_refuses_other_globals_and_executes_no_code(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    for protocol in (3, 4):  # protocol 2 would write Python 2's names
        path = rewritten(tmp_path, {"data.pkl": pickle.dumps({"a": value}, protocol)})
        with one_line(f"asks for '{name}', which no state dict needs; refused"):
            pth.read(path)
    assert not (tmp_path / "canary").exists()


def test_pth_read_reads_a_pickle_made_by_hand(tmp_path):
    path = rewritten(tmp_path, edited(offset=1, shape=3, stride=2))
    assert_same_tensors(pth.read(path), {"a": np.array([1, 3, 5], np.float32)})


def test_pth_read_ignores_attributes_in_the_pickle(tmp_path):
    content = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x07sb."
    assert pth.read(rewritten(tmp_path, {"data.pkl": content})) == {}


def test_pth_read_names_a_record_past_the_end_of_the_file(tmp_path):
    path = rewritten(tmp_path)
    content = bytearray(path.read_bytes())
    size = content.rindex(b"PK\1\2") + 24  # size of the last record in the zip's central directory
    content[size : size + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    with one_line(r"truncated: record 'archive/version' ends past the end of the file"):
        pth.read(path)


def test_pth_read_refuses_compressed_records(tmp_path):
    with one_line(r"record 'archive/data.pkl' is compressed"):
        pth.read(rewritten(tmp_path, compression=zipfile.ZIP_DEFLATED))


# ---- live judges


def bits(x):
    """The bits of a torch tensor, as integers."""
    import torch

    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.live
def test_pth_write_is_read_by_torch(tmp_path):
    import torch

    pth.write(tmp_path / "model.pth", all_kinds())
    loaded = torch.load(tmp_path / "model.pth", weights_only=True, mmap=True)
    assert list(loaded) == list(all_kinds())
    for name, x in all_kinds().items():
        assert (str(loaded[name].dtype), tuple(loaded[name].shape)) == (f"torch.{x.dtype}", x.shape)
        assert bits(loaded[name]) == x.tobytes(), name


@pytest.mark.live
@pytest.mark.parametrize("protocol", [2, 5])
def test_pth_read_reads_torch_files_of_every_pickle_protocol(tmp_path, protocol):
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
        assert (str(x.dtype), tuple(x.shape)) == (f"torch.{tensors[name].dtype}", tensors[name].shape)
        assert tensors[name].tobytes() == bits(x), name


@pytest.mark.live
def test_pth_read_refuses_old_and_whole_module_files_of_torch(tmp_path):
    import torch

    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch's old format"):
        rwkv_jax.load(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"'torch.nn.modules.linear.Linear', which no state dict needs; refused"):
        pth.read(path)
