"""The same weights in three implementations, ours read by theirs: logits, and 200 greedy tokens."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import rwkv_jax

pytestmark = pytest.mark.live

NUM_NEW = 200
SHAPES = [
    {"vocab_size": 40, "num_layers": 2, "dim": 32},
    {"vocab_size": 300, "num_layers": 7, "dim": 64, "hidden_dim": 96},  # more layers than a rescaling period
    {"vocab_size": 50277, "num_layers": 3, "dim": 128},
]
RWKV_PACKAGE = """
import os, sys
os.environ["RWKV_JIT_ON"] = os.environ["RWKV_CUDA_ON"] = "0"
import numpy as np
from rwkv.model import RWKV

model = RWKV(model=sys.argv[1].removesuffix(".pth"), strategy="cpu fp32", verbose=False)
prompt, count = [int(t) for t in sys.argv[4:]], int(sys.argv[3])
logits, _ = model.forward(prompt, None, full_output=True)
last, state = model.forward(prompt, None)
new = []
for _ in range(count):
    new.append(int(last.argmax()))
    last, state = model.forward(new[-1:], state)
np.savez(sys.argv[2], logits=logits.numpy(), new=new, last=last.numpy())
"""
TRANSFORMERS = """
import sys
import numpy as np, torch
from transformers import RwkvForCausalLM

model = RwkvForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
prompt, count = [int(t) for t in sys.argv[4:]], int(sys.argv[3])
with torch.no_grad():
    out = model(torch.tensor([prompt]))
    logits, last, state, new = out.logits[0].numpy(), out.logits[0, -1], out.state, []
    for _ in range(count):
        new.append(int(last.argmax()))
        out = model(torch.tensor([new[-1:]]), state=state)
        last, state = out.logits[0, -1], out.state
np.savez(sys.argv[2], logits=logits, new=new, last=last.numpy())
"""


@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: f"{fields['num_layers']}x{fields['dim']}")
@pytest.mark.parametrize("theirs", ["rwkv package", "transformers"])
def test_logits_and_greedy_continuations_are_theirs(theirs, fields, tmp_path):
    model = rwkv_jax.build("rwkv4", scan=False, matmul_precision="highest", **fields)
    rng = np.random.default_rng(fields["dim"])
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    prompt = rng.integers(1, fields["vocab_size"], 33).tolist()

    path, program = {
        "rwkv package": (tmp_path / "model.pth", RWKV_PACKAGE),
        "transformers": (tmp_path / "folder", TRANSFORMERS),
    }[theirs]
    rwkv_jax.save(path, model, params)
    arguments = [path, tmp_path / "out.npz", NUM_NEW, *prompt]
    run = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = np.load(tmp_path / "out.npz")

    lm = rwkv_jax.RWKVForCausalLM.from_pretrained(path)
    logits_BTV, _ = jax.jit(lm.model.apply)({"params": lm.params}, np.array([prompt]))
    within(logits_BTV[0], expected["logits"], 1e-5)
    new, context = lm.generate(prompt, max_new_tokens=NUM_NEW, temperature=0, stop_tokens=(), return_context=True)
    assert len(set(new)) > 5  # not one token for ever
    assert new == expected["new"].tolist()
    within(context.logits_BV[0], expected["last"], 1e-4)


def within(actual, expected, tolerance):
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()
