"""Logits and gradients of the released RWKV-4 code on small random weights: `python tests/goldens/make_goldens.py`.

Two judges: the `rwkv` package (BlinkDL's own inference, "cpu fp32") gives logits, and transformers' `RwkvForCausalLM`
gives logits and, by torch's autograd, the gradients of the mean loss. Needs requirements-live.txt. Writes rwkv4.npz:

    weights/NAME    official state dict, float16 (exact: the weights are rounded to it before anything is computed)
    tokens_BT       ids
    logits/rwkv     [B, T, V] from the `rwkv` package, one sequence at a time
    logits/hf       [B, T, V] from transformers
    gradients/NAME  of the mean loss over tokens_BT[:, 1:], from transformers, official names and shapes
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

V, D, L, B, T = 24, 16, 3, 3, 20
OUTPUT = Path(__file__).with_name("rwkv4.npz")


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """An official RWKV-4 state dict with magnitudes like trained ones: every tensor matters, none is zero."""
    rng = np.random.default_rng(seed)
    matrix = lambda rows, columns: rng.standard_normal((rows, columns)) / np.sqrt(columns)
    around = lambda mean, spread: mean + spread * rng.standard_normal(D)
    mix = lambda: rng.uniform(0, 1.2, (1, 1, D))
    norm = lambda name: {f"{name}.weight": around(1, 0.3), f"{name}.bias": around(0, 0.3)}
    weights = {"emb.weight": rng.standard_normal((V, D)), **norm("blocks.0.ln0")}
    for i in range(L):
        block = {
            **norm("ln1"),
            **norm("ln2"),
            "att.time_decay": np.linspace(-6, 2, D) + around(0, 0.3),
            "att.time_first": around(-1, 1),
            **{f"att.time_mix_{x}": mix() for x in "kvr"},
            **{f"att.{x}.weight": matrix(D, D) for x in ("value", "receptance", "output")},
            "att.key.weight": 2 * matrix(D, D),
            **{f"ffn.time_mix_{x}": mix() for x in "kr"},
            "ffn.key.weight": matrix(4 * D, D),
            "ffn.receptance.weight": matrix(D, D),
            "ffn.value.weight": matrix(D, 4 * D),
        }
        weights |= {f"blocks.{i}.{name}": x for name, x in block.items()}
    weights |= {**norm("ln_out"), "head.weight": matrix(V, D)}
    return {name: x.astype(np.float16) for name, x in weights.items()}


def random_tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (B, T))


def _tensors(weights):
    import torch

    return {name: torch.from_numpy(x.astype(np.float32)) for name, x in weights.items()}


def rwkv_package(weights, tokens_BT, one_by_one=False) -> np.ndarray:
    """Logits [B, T, V] of the `rwkv` package in float32; `one_by_one`: token by token, the state carried."""
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read when the package is imported
    import torch
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        torch.save(_tensors(weights), f"{folder}/model.pth")
        model = RWKV(f"{folder}/model", "cpu fp32", verbose=False)

    def row(ids):
        if not one_by_one:
            return model.forward(ids, None, full_output=True)[0]
        state, out = None, []
        for token in ids:
            logits, state = model.forward([token], state)
            out.append(logits)
        return torch.stack(out)

    return np.stack([row(ids).numpy() for ids in tokens_BT.tolist()])


def transformers_model(weights, tokens_BT) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(logits [B, T, V], gradients of the mean next-token loss by official name) of `RwkvForCausalLM` in float32."""
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=V, context_length=T, hidden_size=D, num_hidden_layers=L, rescale_every=0, use_cache=False
    )
    model = RwkvForCausalLM(config).train()  # evaluation mode would rescale weights in place
    names = {name: _transformers_name(name) for name in weights}
    model.load_state_dict({names[name]: x for name, x in _tensors(weights).items()}, strict=True)
    ids = torch.from_numpy(tokens_BT)
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)).backward()
    parameters = dict(model.named_parameters())
    return logits.detach().numpy(), {name: parameters[names[name]].grad.numpy() for name in weights}


def _transformers_name(name: str) -> str:
    """The name by which transformers' own conversion script (up to 4.x) renamed a released tensor."""
    if name == "head.weight":
        return name
    for pattern, replacement in (
        (r"^emb\.", "embeddings."),
        (r"\.ln0\.", ".pre_ln."),
        (r"\.att\.", ".attention."),
        (r"\.ffn\.", ".feed_forward."),
        (r"time_mix_k$", "time_mix_key"),
        (r"time_mix_v$", "time_mix_value"),
        (r"time_mix_r$", "time_mix_receptance"),
    ):
        name = re.sub(pattern, replacement, name)
    return f"rwkv.{name}"


def main():
    weights, tokens_BT = random_weights(0), random_tokens(1)
    logits, gradients = transformers_model(weights, tokens_BT)
    arrays = {f"weights/{name}": x for name, x in weights.items()}
    arrays |= {"tokens_BT": tokens_BT.astype(np.int32)}
    arrays |= {"logits/rwkv": rwkv_package(weights, tokens_BT), "logits/hf": logits}
    arrays |= {f"gradients/{name}": x for name, x in gradients.items()}
    np.savez_compressed(OUTPUT, **arrays)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1e3:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
