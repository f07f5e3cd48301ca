"""Saved models, read by the `rwkv` package and transformers: logits, and 200 greedy tokens."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from small import made

import rwkv_jax

pytestmark = pytest.mark.live

NUM_NEW = 200
SHAPES = [
    {"vocab_size": 40, "num_layers": 2, "dim": 32},
    {"vocab_size": 300, "num_layers": 7, "dim": 64, "hidden_dim": 96},  # more layers than a rescaling period
    {"vocab_size": 50277, "num_layers": 3, "dim": 128},
]
# Each program reads [[file, output, prompt], ...] from its first argument.
RWKV_PACKAGE = """
import json, os, sys
os.environ["RWKV_JIT_ON"] = os.environ["RWKV_CUDA_ON"] = "0"
import numpy as np
from rwkv.model import RWKV

for file, output, prompt in json.loads(sys.argv[1]):
    model = RWKV(model=file.removesuffix(".pth"), strategy="cpu fp32", verbose=False)
    logits, _ = model.forward(prompt, None, full_output=True)
    last, state = model.forward(prompt, None)
    new = []
    for _ in range(int(sys.argv[2])):
        new.append(int(last.argmax()))
        last, state = model.forward(new[-1:], state)
    np.savez(output, logits=logits.numpy(), new=new, last=last.numpy())
"""
TRANSFORMERS = """
import json, sys
import numpy as np, torch
from transformers import RwkvForCausalLM

for file, output, prompt in json.loads(sys.argv[1]):
    model = RwkvForCausalLM.from_pretrained(file, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor([prompt]))
        logits, last, state, new = out.logits[0].numpy(), out.logits[0, -1], out.state, []
        for _ in range(int(sys.argv[2])):
            new.append(int(last.argmax()))
            out = model(torch.tensor([new[-1:]]), state=state)
            last, state = out.logits[0, -1], out.state
    np.savez(output, logits=logits, new=new, last=last.numpy())
"""
PACKAGES = {"rwkv package": (".pth", RWKV_PACKAGE), "transformers": ("", TRANSFORMERS)}


@functools.cache
def drawn(i):
    """(model, params, prompt) of SHAPES[i]; the matrices preserve the scale of their inputs."""
    model, params = made("rwkv4", **SHAPES[i])
    scaled = lambda path, x: x * np.float32(3 / x.shape[-2] ** 0.5) if path[-1].key == "kernel" else x
    params = jax.tree_util.tree_map_with_path(scaled, params)
    return model, params, np.random.default_rng(i).integers(1, model.vocab_size, 33).tolist()


@functools.cache
def ours(i):
    """(logits [T, V] of the prompt, greedy tokens, logits [V] after them)."""
    model, params, prompt = drawn(i)
    lm = rwkv_jax.RWKVForCausalLM(model, params)
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, np.array([prompt]))
    new, context = lm.generate(prompt, max_new_tokens=NUM_NEW, temperature=0, stop_tokens=(), return_context=True)
    return np.asarray(logits_BTV[0]), new, np.asarray(context.logits_BV[0])


@pytest.mark.parametrize("package", PACKAGES)
def test_saved_models_have_equal_logits_and_greedy_tokens_in_other_packages(package, tmp_path):
    suffix, program = PACKAGES[package]
    jobs = []
    for i in range(len(SHAPES)):
        model, params, prompt = drawn(i)
        jobs.append([f"{tmp_path}/{i}{suffix}", f"{tmp_path}/{i}.npz", prompt])
        rwkv_jax.save(jobs[-1][0], model, params)
    command = [sys.executable, "-c", program, json.dumps(jobs), str(NUM_NEW)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for i, (file, output, _) in enumerate(jobs):
        read = rwkv_jax.load(file)[1]
        jax.tree.map(np.testing.assert_array_equal, read, drawn(i)[1])
        expected, (logits_TV, new, last_V) = np.load(output), ours(i)
        assert_within(logits_TV, expected["logits"], 1e-5)
        assert len(set(new)) > 5  # not one token repeated
        assert new == expected["new"].tolist()
        assert_within(last_V, expected["last"], 1e-4)


def assert_within(actual, expected, tolerance):
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()
