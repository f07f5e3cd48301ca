"""Generation at the shape of the released 169M model: beside the `rwkv` package, and after 131,072 tokens.

Decoding reads all parameters but the embedding for each token, so the machine's read bandwidth bounds it. Reading a
prompt is a matter of matrix products. What was read changes neither the time of a token nor the memory.

float32 is the dtype for a CPU: XLA decodes in bfloat16 at two thirds of its speed, and int8 weights were not kept. The
head of this shape alone, 1 x 768 times 768 x 50,277, took 2.8 ms in float32, 45 in bfloat16, 44 with int8 weights
widened in the product, and 4.3 with them as a fused sum (2 cores of an AMD EPYC, jax 0.10.2, 2026-11-24).
"""

import os
import resource
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from experiments.speed.decode import live, total_bytes
from experiments.speed.timing import medians, ratio
from rwkv_jax import generate

SHAPE = {"num_layers": 12, "dim": 768, "vocab_size": 50277}
FULL = {"fields": SHAPE, "tokens": 128, "prompt": 1024, "context": 131072, "rounds": 5}
SMOKE = {
    "fields": {"num_layers": 2, "dim": 64, "vocab_size": 256},
    "tokens": 4,
    "prompt": 64,
    "context": 600,
    "rounds": 1,
}
PACKAGE = 'rwkv package, "cpu fp32"'


def run(smoke):
    shape = SMOKE if smoke else FULL
    model = rwkv_jax.build("rwkv4", scan=False, **shape["fields"])
    params = live(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
    return {
        "shape": shape,
        "rows": beside_the_package(model, params, shape),
        "bound": beside_reading(model, params, shape),
        "contexts": after_contexts(model, params, shape),
        "dtypes": dtypes(model, params, shape),
    }


def report(results):
    bound = results["bound"]
    speed = f"{bound['bytes'] / bound['reading_seconds'] / 1e9:.0f} GB/s"
    lines = [f"decoding at {bound['share']:.0%} of the speed of reading the parameters alone, {speed} (75 % wanted)"]
    for row in results["contexts"]:
        line = f"after {row['context']:>7,} tokens: {1e3 * row['seconds']:.2f} ms a token, "
        lines.append(line + f"state {row['state_bytes']:,} bytes, peak memory {row['peak_bytes'] / 1e9:.3f} GB")
    return lines + [f"decoding in {name}: {speed:,.1f} tokens/s" for name, speed in results["dtypes"].items()]


def beside_the_package(model, params, shape):
    """Rows of decoding and of reading a prompt, ours and the `rwkv` package's from the same weights."""
    os.environ.setdefault("RWKV_JIT_ON", "1")
    os.environ.setdefault("RWKV_CUDA_ON", "0")
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        rwkv_jax.save(f"{folder}/model.pth", model, params)
        theirs = RWKV(model=f"{folder}/model", strategy="cpu fp32", verbose=False)

    def decode_theirs(prompt):
        logits, state = theirs.forward(prompt.tolist(), None)
        out = []
        for _ in range(shape["tokens"]):
            out.append(int(logits.argmax()))
            logits, state = theirs.forward(out[-1:], state)
        return out

    def read_ours(prompt):
        return np.asarray(generate.read(model, params, prompt).logits_BV)[0]

    def read_theirs(prompt):
        return theirs.forward(prompt.tolist(), None)[0].numpy()

    def row(what, ours, theirs, tokens, prompt, wanted):
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, model.vocab_size, (2 * shape["rounds"] + 4, prompt)).astype(np.int32)
        agreed = np.allclose(ours(prompts[0]), theirs(prompts[0]), rtol=0, atol=1e-3)
        seconds = medians({"rwkv4": ours, PACKAGE: theirs}, prompts[1:], shape["rounds"], pause=0.5)
        ours_per_second, theirs_per_second = (tokens / seconds[side] for side in ("rwkv4", PACKAGE))
        return ratio(what, "rwkv4", ours_per_second, PACKAGE, theirs_per_second, wanted) | {"agreed": agreed}

    decode = row("decoding, tokens/s", decoder(model, params, shape), decode_theirs, shape["tokens"], 1, 2.0)
    read = row(
        f"reading {shape['prompt']:,} tokens, tokens/s", read_ours, read_theirs, shape["prompt"], shape["prompt"], 1.6
    )
    return [decode, read]


def beside_reading(model, params, shape):
    """Seconds of a token, and of a sum over as many bytes as the parameters that a token needs, in turn."""
    least = total_bytes(params) - params["emb"]["embedding"].nbytes
    numbers = jax.random.normal(jax.random.key(3), (least // 4,))
    total, decode = jax.jit(jnp.sum), decoder(model, params, shape)
    rng = np.random.default_rng(3)
    prompts = rng.integers(0, model.vocab_size, (2 * shape["rounds"] + 2, 1)).astype(np.int32)
    reading = lambda _: [total(numbers).block_until_ready() for _ in range(shape["tokens"])]
    seconds = medians({"token": decode, "reading": reading}, prompts, shape["rounds"])
    token, reading = (t / shape["tokens"] for t in seconds.values())
    return {"bytes": least, "token_seconds": token, "reading_seconds": reading, "share": reading / token}


def decoder(model, params, shape):
    """Greedy tokens that continue a prompt, perhaps after a context."""
    settings = {"max_new_tokens": shape["tokens"], "temperature": 0}
    return lambda prompt, context=None: generate.generate(model, params, prompt, context=context, **settings)


def after_contexts(model, params, shape):
    """Time a token and peak memory of the process after a short context and after a long one, read in truth."""
    rng = np.random.default_rng(1)
    draw = lambda count: rng.integers(0, model.vocab_size, count).astype(np.int32)
    pasts, rows = {}, []
    for context in (0, shape["context"]):
        pasts[context] = generate.read(model, params, draw(max(context, 1)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(pasts[context].state))
        rows.append({"context": context, "state_bytes": state_bytes, "peak_bytes": peak})
    decode = decoder(model, params, shape)
    sides = {context: lambda prompt, past=past: decode(prompt, past) for context, past in pasts.items()}
    seconds = medians(sides, (draw(1) for _ in range(2 * shape["rounds"] + 2)), shape["rounds"])
    return [row | {"seconds": seconds[row["context"]] / shape["tokens"]} for row in rows]


def dtypes(model, params, shape):
    """Tokens/s of decoding with parameters and activations of other dtypes."""
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        rwkv_jax.save(f"{folder}/model.pth", model, params)
        for dtype in ("float32", "bfloat16"):
            sides[dtype] = decoder(*rwkv_jax.load(f"{folder}/model.pth", dtype=dtype, scan=False), shape)
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, model.vocab_size, (2 * shape["rounds"] + 2, 1)).astype(np.int32)
    return {name: shape["tokens"] / t for name, t in medians(sides, prompts, shape["rounds"]).items()}
