"""Memory of loading: little more than the parameters themselves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import rwkv_jax
from rwkv_jax import models

PROGRAM = """
import re, sys, threading, time
import jax, jax.numpy as jnp
from rwkv_jax import interop, models

anonymous = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
jnp.zeros(3).block_until_ready()
before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
_, params = interop.load(sys.argv[1], scan=sys.argv[2] == "True")
jax.block_until_ready(params)
done = True
thread.join()
size = sum(x.nbytes for x in jax.tree.leaves(params))
print((peak - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m", "m.bin"])
def test_load_takes_little_more_memory_than_the_model(tmp_path, name):
    """16 layers of width 1,024 in float16, 450 MB. Pages of the mapped file do not count: the system reclaims them."""
    model = rwkv_jax.build("rwkv4", vocab_size=4096, num_layers=16, dim=1024, param_dtype="float16", scan=False)
    shapes = flatten_dict(models.parameter_shapes(model), sep="/")
    params = {key: np.full(x.shape, -1, x.dtype) for key, x in shapes.items()}
    rwkv_jax.save(
        tmp_path / name, model, unflatten_dict(params, sep="/"), format="rwkv.cpp" if name == "m.bin" else None
    )
    for scan in (True, False):
        command = [sys.executable, "-c", PROGRAM, tmp_path / name, str(scan)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert 0.9 < float(run.stdout) < 1.3, (scan, run.stdout)
