"""Generation at the shape of the released 169M model: against the `rwkv` package, and after 131,072 tokens.

Decoding reads all parameters but the embedding for each token, so the machine's read bandwidth bounds it. Reading a
prompt is bound by matrix products. The text read before changes neither the time of a token nor the memory.

float32 is the dtype for a CPU: XLA decodes in bfloat16 at two thirds of its speed (2 cores of an AMD EPYC, jax 0.10.2,
2026-11-24).
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

FULL = {
    "fields": {"num_layers": 12, "dim": 768, "vocab_size": 50277},
    "tokens": 128,
    "prompt": 1024,
    "context": 131072,
    "rounds": 5,
}
SMOKE = {
    "fields": {"num_layers": 2, "dim": 64, "vocab_size": 256},
    "tokens": 4,
    "prompt": 64,
    "context": 600,
    "rounds": 1,
}
PACKAGE = 'rwkv package, "cpu fp32"'


def run(smoke: bool) -> dict:
    shape = SMOKE if smoke else FULL
    model = rwkv_jax.build("rwkv4", scan=False, **shape["fields"])
    params = live(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
    return {
        "shape": shape,
        "rows": beside_the_package(model, params, shape),
        "bound": beside_reading(model, params, shape),
        "contexts": after_contexts(model, params, shape),
    }


def report(results: dict) -> list[str]:
    bound = results["bound"]
    speed = f"{bound['bytes'] / bound['reading_seconds'] / 1e9:.0f} GB/s"
    lines = [f"decoding at {bound['share']:.0%} of the speed of reading the parameters alone, {speed} (75 % wanted)"]
    for row in results["contexts"]:
        line = f"after {row['context']:>7,} tokens: {1e3 * row['seconds']:.2f} ms a token, "
        lines.append(line + f"state {row['state_bytes']:,} bytes, peak memory {row['peak_bytes'] / 1e9:.3f} GB")
    return lines


def prompts(model, length: int, shape: dict):
    """Return [N, length] random tokens, enough for two sides, and one more."""
    size = (2 * shape["rounds"] + 3, length)
    return np.random.default_rng(0).integers(0, model.vocab_size, size).astype(np.int32)


def beside_the_package(model, params, shape: dict, wanted=(2.0, 1.6)) -> list[dict]:
    """Return the rows of decoding and of reading a prompt, by us and by the `rwkv` package from the same weights."""
    os.environ.setdefault("RWKV_JIT_ON", "1")
    os.environ.setdefault("RWKV_CUDA_ON", "0")
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        rwkv_jax.save(f"{folder}/model.pth", model, params)
        quiet = {} if os.environ.get("RWKV_V7_ON") == "1" else {"verbose": False}
        theirs = RWKV(model=f"{folder}/model", strategy="cpu fp32", **quiet)

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

    def row(what, ours, theirs, tokens, prompt_length, wanted):
        first, *others = prompts(model, prompt_length, shape)
        agreed = np.allclose(ours(first), theirs(first), rtol=0, atol=1e-3)
        name = model.layers[0]
        seconds = medians({name: ours, PACKAGE: theirs}, others, shape["rounds"], pause=0.5)
        speeds = [tokens / seconds[side] for side in (name, PACKAGE)]
        return ratio(what, name, speeds[0], PACKAGE, speeds[1], wanted) | {"agreed": agreed}

    tokens, length = shape["tokens"], shape["prompt"]
    return [
        row("decoding, tokens/s", decoder(model, params, shape), decode_theirs, tokens, 1, wanted[0]),
        row(f"reading {length:,} tokens, tokens/s", read_ours, read_theirs, length, length, wanted[1]),
    ]


def beside_reading(model, params, shape: dict) -> dict:
    """Return the seconds of a token, and of a sum over as many bytes as the parameters it needs, in turn."""
    least = total_bytes(params) - params["emb"]["embedding"].nbytes
    numbers, total = jax.random.normal(jax.random.key(3), (least // 4,)), jax.jit(jnp.sum)
    reading = lambda _: [total(numbers).block_until_ready() for _ in range(shape["tokens"])]
    sides = {"token": decoder(model, params, shape), "reading": reading}
    seconds = medians(sides, prompts(model, 1, shape), shape["rounds"])
    token, reading = (seconds[side] / shape["tokens"] for side in sides)
    return {"bytes": least, "token_seconds": token, "reading_seconds": reading, "share": reading / token}


def decoder(model, params, shape: dict):
    """Return a function of a prompt, optionally after a context, that returns its greedy continuation."""
    settings = {"max_new_tokens": shape["tokens"], "temperature": 0, "stop_tokens": ()}
    return lambda prompt, context=None: generate.generate(model, params, prompt, context=context, **settings)


def after_contexts(model, params, shape: dict) -> list[dict]:
    """Return the time a token and peak memory of the process after one token and after reading a long text."""
    rng = np.random.default_rng(1)
    pasts, rows = {}, []
    for context in (0, shape["context"]):
        text = rng.integers(0, model.vocab_size, max(context, 1)).astype(np.int32)
        pasts[context] = generate.read(model, params, text)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"context": context, "state_bytes": total_bytes(pasts[context].state), "peak_bytes": peak})
    decode = decoder(model, params, shape)
    sides = {context: lambda prompt, past=past: decode(prompt, past) for context, past in pasts.items()}
    seconds = medians(sides, prompts(model, 1, shape), shape["rounds"])
    return [row | {"seconds": seconds[row["context"]] / shape["tokens"]} for row in rows]
