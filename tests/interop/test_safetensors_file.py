"""`.safetensors` files, against the library of that name."""

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from weights import assert_same_tensors

from rwkv_jax.interop import safetensors_file


def test_safetensors_file_exchanges_files_with_the_library(tmp_path):
    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng(0)
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
    kinds += ("uint64", "uint32", "uint16", "uint8", "bool")
    tensors = {name: (rng.normal(size=(3, 5)) * 9).astype(jnp.dtype(name)) for name in kinds}
    tensors |= {"transposed": tensors["float32"].T, "skálár": np.float32(2.5), "empty": np.zeros((0, 3), np.float16)}
    safetensors_file.write(path, tensors, {"key": "value"})
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"key": "value"}
    for found in (safetensors.numpy.load_file(path), safetensors_file.read(path)[0]):
        assert_same_tensors(found, tensors)
    assert all(x.ctypes.data % x.itemsize == 0 for x in safetensors_file.read(path)[0].values())
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, path)
    found, metadata = safetensors_file.read(path)
    assert metadata == {}
    assert all(found[name].tobytes() == x.tobytes() for name, x in tensors.items())
    assert not found["float32"].flags.owndata and not found["float32"].flags.writeable
